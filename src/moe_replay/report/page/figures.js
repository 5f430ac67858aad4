// Figures, theme, and which runs are shown. Traces come from Python; colours that begin with "@"
// are variables of page.css, so that one figure serves both themes.
"use strict";

const facts = JSON.parse(document.getElementById("facts").textContent);
const hidden = new Set();
const page = document.documentElement;

function variable(name) {
  return getComputedStyle(page).getPropertyValue(`--${name}`).trim();
}

function colour(text) {
  // "@run0" is a variable, "@run0/18" the same at 18 % opacity.
  const [name, opacity] = text.slice(1).split("/");
  const known = variable(name) || variable(name.replace(/\d+$/, (n) => String(Number(n) % 8)));
  if (opacity === undefined) return known;
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(known.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${Number(opacity) / 100})`;
}

function themed(value, key) {
  if (Array.isArray(value)) return value.map((each) => themed(each, key));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, k)]));
  }
  const isColour = typeof value === "string" && value.startsWith("@");
  if (!isColour || !["color", "fillcolor", "colorscale"].includes(key)) return value;
  if (value === "@sequential") {
    // From the paper to a colour that all kinds of sight tell apart from it by lightness alone.
    return [0, 1, 2, 3].map((n) => [n / 3, variable(`heat${n}`)]);
  }
  return colour(value);
}

function axis(own) {
  return {
    gridcolor: variable("grid"),
    zerolinecolor: variable("grid"),
    linecolor: variable("quiet"),
    automargin: true,
    ...own,
    title: { standoff: 8, font: { size: 12, color: variable("quiet") }, ...(own || {}).title },
  };
}

function layoutOf(own, traces, width, height) {
  const named = traces.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap");
  // plotly gives every entry of a legend the width of the longest.
  const longest = Math.max(0, ...named.map((trace) => trace.name.length));
  const aLine = Math.max(1, Math.floor((width - 90) / (52 + 7 * longest)));
  const rows = named.length > 1 ? Math.ceil(named.length / aLine) : 0;
  const layout = {
    font: { family: variable("sans"), size: 12, color: variable("ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 14, t: 10, b: 40 },
    hovermode: "x unified",
    hoverlabel: {
      bgcolor: variable("paper"),
      bordercolor: variable("line"),
      font: { color: variable("ink"), size: 12 },
      namelength: -1,
    },
    showlegend: rows > 0,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...own,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...own.legend },
    height: height + 20 * rows,
    width,
  };
  layout.xaxis = axis(own.xaxis);
  layout.yaxis = axis(own.yaxis);
  if (own.yaxis2) layout.yaxis2 = axis(own.yaxis2);
  return layout;
}

const CONFIG = {
  displaylogo: false,
  responsive: false,
  doubleClick: "reset",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

function draw(place, figure) {
  const traces = themed(figure.traces, "").map((trace) => {
    const run = trace.meta ? trace.meta.run : undefined;
    return hidden.has(run) ? { ...trace, visible: false } : trace;
  });
  const width = place.clientWidth;
  Plotly.react(place, traces, layoutOf(themed(figure.layout, ""), traces, width, figure.height), CONFIG);
}

function chosenMetric() {
  const metric = facts.metrics[Number(document.getElementById("metric").value)];
  const traces = [];
  metric.lines.forEach((line, run) => {
    if (line === null) return;
    const found = { type: "scatter", mode: line.x.length > 60 ? "lines" : "lines+markers" };
    found.name = facts.runs[run].label;
    found.line = { color: `@run${run}`, width: 2 };
    found.meta = { run };
    traces.push({ ...found, x: line.x, y: line.y });
  });
  const unit = metric.unit ? ` [${metric.unit}]` : "";
  document.getElementById("metric-text").textContent = metric.text
    ? `${metric.name}${unit}: ${metric.text}.`
    : `${metric.name}${unit}`;
  document.getElementById("plot-metric").setAttribute("aria-label", `${metric.name} over steps`);
  const layout = { xaxis: { title: { text: "step" } }, yaxis: {} };
  return { traces, layout, height: 280 };
}

function drawAll() {
  for (const place of document.querySelectorAll("[data-figure]")) {
    draw(place, facts.figures[place.dataset.figure]);
  }
  if (facts.metrics.length) draw(document.getElementById("plot-metric"), chosenMetric());
}

function isDark() {
  if (page.dataset.theme) return page.dataset.theme === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(isDark()));
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  for (const swatch of document.querySelectorAll(".swatch")) {
    swatch.style.background = colour(`@run${swatch.dataset.run}`);
  }
  drawAll();
}

document.getElementById("theme").addEventListener("click", () => {
  page.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

for (const box of document.querySelectorAll("[data-toggle]")) {
  box.addEventListener("change", () => {
    const run = Number(box.dataset.toggle);
    if (box.checked) hidden.delete(run);
    else hidden.add(run);
    drawAll();
  });
}

const metricChoice = document.getElementById("metric");
facts.metrics.forEach((metric, at) => metricChoice.add(new Option(metric.name, String(at))));
const first = facts.metrics.findIndex((metric) => metric.name === "entropy/mean");
if (first >= 0) metricChoice.value = String(first);
metricChoice.addEventListener("change", () =>
  draw(document.getElementById("plot-metric"), chosenMetric()),
);
if (!facts.metrics.length) document.getElementById("metrics").hidden = true;

let width = innerWidth;
let waiting = 0;
addEventListener("resize", () => {
  // A phone that hides its address bar changes the height only.
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 120);
});

let before;
addEventListener("beforeprint", () => {
  before = page.dataset.theme;
  page.dataset.theme = "light";
  page.classList.add("printed");
  showTheme();
});
addEventListener("afterprint", () => {
  if (before === undefined) delete page.dataset.theme;
  else page.dataset.theme = before;
  page.classList.remove("printed");
  showTheme();
});

showTheme();
