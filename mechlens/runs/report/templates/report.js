// Unpacks plotly and draws the figures one after the other, in the colours of the screen; on paper they are light.
const {config, onDark} = JSON.parse(document.getElementById("drawing").textContent);
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
}

function draw(plot, isDark) {
  const written = plot.nextElementSibling.textContent;
  const seen = isDark ? written.replace(/#[0-9a-f]{6}/g, (colour) => onDark[colour] ?? colour) : written;
  const {data, layout} = JSON.parse(seen);
  if (plot.clientWidth < 600 && layout.showlegend) {  // on a phone the legend takes a line a name
    layout.height += 20 * data.filter((trace) => trace.showlegend !== false).length;
    plot.style.height = `${layout.height}px`;
  }
  return Plotly.react(plot, data, layout, config);
}

async function drawAll() {
  await unpack(document.getElementById("plotly").textContent);
  for (const plot of plots) {
    draw(plot, dark.matches);
    await new Promise((done) => setTimeout(done));  // so that the page can be read and scrolled meanwhile
  }
  document.documentElement.dataset.drawn = "yes";
  dark.addEventListener("change", () => plots.forEach((plot) => draw(plot, dark.matches)));
  addEventListener("beforeprint", () => plots.forEach((plot) => { draw(plot, false); Plotly.Plots.resize(plot); }));
  addEventListener("afterprint", () => plots.forEach((plot) => { draw(plot, dark.matches); Plotly.Plots.resize(plot); }));
}

drawAll();
