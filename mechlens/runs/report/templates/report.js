// Unpacks plotly and draws each figure when it comes near the screen, in its colours; on paper all are drawn, light.
const {config, onDark} = JSON.parse(document.getElementById("drawing").textContent);
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const paperWidth = 640;  // pixels that the narrower of the usual sheets leaves to a figure
const plots = [...document.querySelectorAll(".plot")];
const drawn = new Set();

async function unpack(packed) {
  const letters = atob(packed);
  const bytes = new Uint8Array(letters.length);  // a loop: Uint8Array.from takes ten times as long
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
}

// Plotly breaks no lines: a title longer than its axis would be cut.
function wrapped(text, pixels) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const line = `${lines.at(-1)} ${word}`.trim();
    if (7 * line.length > pixels && lines.at(-1)) lines.push(word);
    else lines[lines.length - 1] = line;
  }
  return lines.join("<br>");
}

function draw(plot, isDark, onPaper = false) {
  drawn.add(plot);
  const written = plot.nextElementSibling.textContent;
  const seen = isDark ? written.replace(/#[0-9a-f]{6}/g, (colour) => onDark[colour] ?? colour) : written;
  const {data, layout} = JSON.parse(seen);
  const width = onPaper ? paperWidth : plot.clientWidth;
  if (onPaper) layout.width = width;
  if (width < 600 && layout.showlegend) {  // on a phone the legend takes a line a name
    layout.height += 20 * data.filter((trace) => trace.showlegend !== false).length;
  }
  plot.style.height = `${layout.height}px`;
  for (const [name, axis] of Object.entries(layout)) {
    if (!/^[xy]axis/.test(name) || !axis.title?.text) continue;
    const [from, to] = axis.domain ?? [0, 1];
    const room = name[0] === "x" ? width - 90 : layout.height - 150;
    axis.title.text = wrapped(axis.title.text, (to - from) * room);
  }
  return Plotly.react(plot, data, layout, config);
}

function drawAgain(some, isDark, onPaper = false) {
  for (const plot of some) draw(plot, isDark, onPaper);
  document.documentElement.dataset.drawn = isDark ? "dark" : "light";
}

function drawNear(entries) {
  for (const {isIntersecting, target} of entries) if (isIntersecting && !drawn.has(target)) draw(target, dark.matches);
  // Where the colours have just changed, those drawn before still wait for theirs.
  document.documentElement.dataset.drawn ??= dark.matches ? "dark" : "light";
}

async function start() {
  await unpack(document.getElementById("plotly").textContent);
  const observer = new IntersectionObserver(drawNear, {rootMargin: "50% 0px"});
  for (const plot of plots) observer.observe(plot);
  dark.addEventListener("change", () => drawAgain(drawn, dark.matches));
  addEventListener("beforeprint", () => drawAgain(plots, false, true));
  addEventListener("afterprint", () => {
    for (const plot of plots) Plotly.purge(plot);  // as wide as paper, they would keep a phone's page so wide
    drawAgain(plots, dark.matches);
  });
}

start();
