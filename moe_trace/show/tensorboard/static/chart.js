// Draws plotly specifications in the colours of the theme. Without plotly the tables still say everything.

import {el} from "./dom.js";

// The five colours of moe_trace.show.figures.all_figures.DIVERGING, and those that take their places on a dark ground.
const DIVERGING = ["#2166AC", "#92C5DE", "#F5F5F5", "#FDB863", "#B35806"];
const DIVERGING_DARK = ["#5AB0F2", "#24567F", "#2A3038", "#8A5213", "#FFA94D"];
const BRIGHTER = {"#0072B2": "#4C9FE6", "#2166AC": "#5AB0F2", "#B35806": "#FFA94D", "#7A5195": "#B794D6",
  "#009E73": "#22B88F"};
const drawn = new Set();
let bundle;

function loadPlotly() {
  bundle ??= new Promise((done, fail) => {
    const script = el("script", {src: "plotly.min.js", onload: () => done(window.Plotly), onerror: () => {
      bundle = undefined;
      fail(new Error("Charts need plotly, which is not installed here: pip install 'moe_trace[report]'. "
        + "The tables say the same."));
    }});
    document.head.append(script);
  });
  return bundle;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => document.documentElement.dataset.theme === "dark";

function themedLayout(layout) {
  const axis = {gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--line"), automargin: true};
  const themed = {
    ...layout,
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: css("--ink"), family: "Roboto, system-ui, 'Liberation Sans', sans-serif", size: 12.5},
    margin: {l: 56, r: 16, t: 10, b: 44},
    hoverlabel: {bgcolor: css("--panel"), bordercolor: css("--line"), font: {color: css("--ink")}},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...layout.legend},
  };
  for (const name of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))])) {
    themed[name] = {...axis, ...layout[name]};
  }
  return themed;
}

function brighter(colour) {
  if (Array.isArray(colour)) return colour.map(brighter);
  return BRIGHTER[colour] ?? (typeof colour === "string" ? colour.replace(/^(hsl\(.*, )50%\)$/, "$165%)") : colour);
}

function themedTrace(trace) {
  if (!isDark()) return trace;
  const themed = {...trace};
  for (const part of ["marker", "line"]) {
    if (themed[part]?.color) themed[part] = {...themed[part], color: brighter(themed[part].color)};
  }
  if (Array.isArray(trace.colorscale)) {
    const colour = (given) => DIVERGING_DARK[DIVERGING.indexOf(given)] ?? given;
    themed.colorscale = trace.colorscale.map(([place, given]) => [place, colour(given)]);
  }
  return themed;
}

function paint(place) {
  const {plotly, spec} = place.chart;
  const config = {responsive: true, displayModeBar: false, scrollZoom: spec.key === "timeline", doubleClick: false};
  return plotly.react(place, spec.data.map(themedTrace), themedLayout(spec.layout), config);
}

// Draws; resolves once the chart stands. `onclick` gets (row, column) of the point.
export async function draw(place, spec, onclick) {
  place.style.minHeight = `${spec.layout.height || 300}px`; // the page must not jump when the chart comes
  let plotly;
  try {
    plotly = await loadPlotly();
  } catch (error) {
    place.style.minHeight = "";
    place.replaceChildren(el("p", {class: "soft"}, error.message));
    return;
  }
  await new Promise((done) => { requestAnimationFrame(done); });
  if (!place.isConnected) return;
  place.chart = {plotly, spec};
  await paint(place);
  drawn.add(place);
  place.dataset.drawn = "true";
  if (onclick) {
    place.classList.add("clickable");
    place.on("plotly_click", (event) => {
      const at = event.points[0].pointIndex ?? event.points[0].pointNumber;
      if (Array.isArray(at)) onclick(at[0], at[1]);
    });
  }
}

// Other numbers in the same chart.
export async function update(place, change) {
  if (!place.chart) return;
  place.chart.spec = change(place.chart.spec);
  await paint(place);
}

// The theme has changed.
export function repaint() {
  for (const place of drawn) {
    if (place.isConnected) paint(place);
    else drawn.delete(place);
  }
}
