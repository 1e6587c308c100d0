// Draws plotly specifications in the colours of the theme. Without plotly the tables still have all data.

import {el} from "./dom.js";
import {themed} from "./theme.js";

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

function paint(place) {
  const {plotly, spec} = place.chart;
  const config = {responsive: true, displayModeBar: false, scrollZoom: spec.key === "timeline", doubleClick: false};
  const {data, layout} = themed(spec, document.documentElement.dataset.theme ?? "light");
  return plotly.react(place, data, layout, config);
}

// Draws the chart and resolves once it is complete. `onclick` receives (row, column) of the point.
export async function draw(place, spec, onclick) {
  place.style.minHeight = `${spec.layout.height || 300}px`; // the page must not jump when the chart appears
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

// Replaces the numbers in the chart.
export async function update(place, change) {
  if (!place.chart) return;
  place.chart.spec = change(place.chart.spec);
  await paint(place);
}

// Redraws after a change of theme.
export function repaint() {
  for (const place of drawn) {
    if (place.isConnected) paint(place);
    else drawn.delete(place);
  }
}
