// Figures are drawn once for the screen, in the look of the page, and once for export, black on white.

const PAPER = { ink: "#000000", soft: "#444444", line: "#bbbbbb", paper: "#ffffff" };
// Okabe and Ito's palette; every series has a mark and a dash of its own, too.
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 4"];
const MARKS = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-4 -4h8v8h-8z", "M0 -5l5 9h-10z", "M0 -6l5 6l-5 6l-5 -6z",
  "M-4 -4l8 8m0 -8l-8 8", "M0 5l5 -9h-10z", "M-5 0h10m-5 -5v10"];

function screenColours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(Object.keys(PAPER).map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

const colourOf = (i) => COLOURS[i % COLOURS.length];
const path = (d, more) => shape("path", { d, fill: "none", "stroke-width": 1.8, ...more });
const mark = (i, at) => path(MARKS[i % MARKS.length], { stroke: colourOf(i), transform: `translate(${at})`,
  fill: [4, 6].includes(i % MARKS.length) || i >= MARKS.length ? "none" : colourOf(i) });

const middle = { "text-anchor": "middle" }, atEnd = { "text-anchor": "end" };

const label = (x, y, text, fill, more) => shape("text", { x, y, fill, ...more }, text);
const canvas = (width, height, look) => shape("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}`,
  role: "img", "font-size": 11, "font-family": "system-ui, sans-serif" }, rect(0, 0, width, height, { fill: look.paper }));

const percentAxis = { high: 100, ticks: [0, 20, 40, 60, 80, 100] };

// Axes with room for a legend of some series; returns the drawing and functions from values to places.
function axes(count, look, x, xLabel, yLabel = "robust accuracy, %") {
  const y = percentAxis, height = Math.max(400, 60 + 17 * count), made = canvas(620, height, look);
  const left = 48, top = 14, bottom = height - 44, end = 430;
  const px = (value) => left + value / x.high * (end - left);
  const py = (value) => bottom - value / y.high * (bottom - top);
  for (const tickAt of y.ticks) {
    made.append(path(`M${left} ${py(tickAt)}H${end}`, { stroke: look.line, "stroke-width": .6 }),
      label(left - 6, py(tickAt) + 4, String(tickAt), look.soft, atEnd));
  }
  x.ticks.forEach((tickAt, i) => made.append(
    path(`M${px(tickAt)} ${bottom}v4`, { stroke: look.soft }),
    label(px(tickAt), bottom + 16, x.names ? x.names[i] : String(tickAt), look.soft, middle)));
  made.append(path(`M${left} ${top}V${bottom}H${end}`, { stroke: look.ink, "stroke-width": 1 }),
    label((left + end) / 2, height - 8, xLabel, look.ink, middle),
    label(0, 0, yLabel, look.ink, { ...middle, transform: `translate(13 ${(top + bottom) / 2})rotate(-90)` }));
  return { made, px, py, end, top, bottom };
}

// Names of the series with their marks, at the right of the axes.
function legend(plot, names, look) {
  names.forEach((name, i) => {
    const y = plot.top + 8 + 17 * i;
    plot.made.append(mark(i, `${plot.end + 18} ${y - 4}`),
      label(plot.end + 30, y, name.length > 26 ? `${name.slice(0, 25)}…` : name, look.ink));
  });
}

// Lines with marks; points are [x, y] or [x, y, low, high].
function lines(plot, series, look) {
  series.forEach(({ points }, i) => {
    const at = points.map(([x, y]) => `${plot.px(x)} ${plot.py(y)}`);
    plot.made.append(path(`M${at.join("L")}`, { stroke: colourOf(i),
      "stroke-dasharray": DASHES[i % DASHES.length] }));
    points.forEach(([x, y, low, high]) => {
      if (low !== undefined) plot.made.append(path(`M${plot.px(x)} ${plot.py(low)}V${plot.py(high)}`, { stroke: colourOf(i) }));
      plot.made.append(mark(i, `${plot.px(x)} ${plot.py(y)}`));
    });
  });
  legend(plot, series.map(({ name }) => name), look);
  return plot.made;
}
