// Unpacks plotly and draws the figures one after the other, in the colours of the screen; on paper they are light.
const {config, onDark} = JSON.parse(document.getElementById("drawing").textContent);
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const paperWidth = 640;  // pixels that the narrower of the usual sheets leaves to a figure
const plots = [...document.querySelectorAll(".plot")];

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
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

function drawAgain(isDark, onPaper = false) {
  for (const plot of plots) draw(plot, isDark, onPaper);
  document.documentElement.dataset.drawn = isDark ? "dark" : "light";
}

async function drawAll() {
  await unpack(document.getElementById("plotly").textContent);
  for (const plot of plots) {
    draw(plot, dark.matches);
    await new Promise((done) => setTimeout(done));  // so that the page can be read and scrolled meanwhile
  }
  document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => drawAgain(dark.matches));
  addEventListener("beforeprint", () => drawAgain(false, true));
  addEventListener("afterprint", () => drawAgain(dark.matches));
}

drawAll();
