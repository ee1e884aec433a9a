// What a reader of the page would stumble over, as sentences; none is good. Run inside the page.
() => {
  const faults = [];
  const shown = (element) => element.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const named = (element) => `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""} "${(element.textContent ?? "").trim().slice(0, 40)}"`;

  const page = document.scrollingElement;
  if (page.scrollWidth > innerWidth) faults.push(`the page is ${page.scrollWidth} wide, the screen ${innerWidth}`);
  const ours = [...document.querySelectorAll("p, h1, h2, h3, figcaption, th, .label, .sign")];  // not tokens and prompts
  const raw = ours.some((element) => !element.closest(".tokens") && element.textContent.includes("`"));
  if (raw) faults.push("a backtick is shown as it is");

  // ---- contrast, of texts of HTML and of figures
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const known = new Map();
  const channels = (colour) => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(colour, [red, green, blue, alpha / 255]);
    }
    return known.get(colour);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
  const backgrounds = new Map();
  const background = (element) => {
    if (!element) return [255, 255, 255];
    if (!backgrounds.has(element)) {
      backgrounds.set(element, over(channels(getComputedStyle(element).backgroundColor), background(element.parentElement)));
    }
    return backgrounds.get(element);
  };
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName) || seen.has(element)) continue;
    seen.add(element);
    if (!shown(element) || element.closest(".heatmap-label")) continue;  // plotly chooses those by their cell
    const style = getComputedStyle(element);
    const below = background(element);
    const ink = over(channels(element instanceof SVGElement ? style.fill : style.color), below);
    if (contrast(ink, below) < 4.5) faults.push(`contrast ${contrast(ink, below).toFixed(1)} of ${named(element)}`);
  }

  // ---- nothing cut, nothing empty, nothing over a title
  for (const element of document.querySelectorAll("main *:not(svg *)")) {
    const clips = ["hidden", "clip"].includes(getComputedStyle(element).overflowX);
    if (clips && !element.closest(".plot") && element.scrollWidth > element.clientWidth + 1) faults.push(`cut: ${named(element)}`);
  }
  for (const line of document.querySelectorAll(".tokens p")) {
    if (!line.textContent.trim()) faults.push("an empty view of tokens");
  }
  for (const figure of document.querySelectorAll("figure")) {
    const plot = figure.querySelector(".plot");
    if (!plot) continue;  // it says that there is nothing to draw
    const marks = ".scatterlayer path, .barlayer path, .heatmaplayer image, .heatmaplayer rect";
    if (!plot.querySelector(marks)) faults.push(`an empty figure: ${plot.id}`);
    if (!figure.querySelector("figcaption")) faults.push(`a figure without a caption: ${plot.id}`);
    const around = figure.getBoundingClientRect();
    for (const text of plot.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      const out = Math.max(around.left - box.left, box.right - around.right, around.top - box.top, box.bottom - around.bottom);
      if (box.width && out > 1) faults.push(`cut by ${out.toFixed(0)} pixels in ${plot.id}: ${named(text)}`);
    }
    const title = figure.querySelector(".figure-title");
    const words = document.createRange();
    words.selectNodeContents(title);
    for (const tools of plot.querySelectorAll(".modebar-group")) {
      const [a, b] = [words.getBoundingClientRect(), tools.getBoundingClientRect()];
      const apart = a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
      if (b.width && shown(tools) && !apart) faults.push(`buttons over the title of ${plot.id}`);
    }
  }
  return [...new Set(faults)];
}
