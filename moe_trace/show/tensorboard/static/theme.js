// Colours of charts in both themes, for the TensorBoard tab and the HTML report. Figures use the colours of
// the light theme; plotly's templates do the rest.

const THEMES = {
  light: {ink: "#1b1f24", grid: "#e3e7eb", line: "#d0d7de", panel: "#f6f8fa"},
  dark: {ink: "#e6edf3", grid: "#4a5058", line: "#575d66", panel: "#2d333b"},
};

// Light -> dark. The dark forms of all colours used in figures are distinct, too.
const DARK = {
  "#0072B2": "#4C9FE6", // blue: router, host
  "#E69F00": "#F2B632", // orange: dispatch, device span
  "#009E73": "#2FD39B", // green: experts, device busy
  "#CC79A7": "#F092C6", // pink: combine
  "#56B4E9": "#B9E3FF", // pale blue: shared
  "#999999": "#B5BBC2", // grey: other
  "#D55E00": "#FF8A3D", // vermilion: the worst layer
  "#7A5195": "#B794D6", // violet: counters
  "#888888": "#AAB2BB",
  // Gaps, and layers that are not highlighted: pale on white, brighter than the panel on black.
  "rgba(128,128,128,0.25)": "rgba(205,212,220,0.3)",
  "rgba(128,128,128,0.22)": "rgba(205,212,220,0.25)",
  "rgba(128,128,128,0.45)": "rgba(205,212,220,0.45)",
  "#2166AC": "#5AB0F2", "#92C5DE": "#24567F", "#F5F5F5": "#2A3038", "#FDB863": "#8A5213", "#B35806": "#FFA94D",
};

function darker(colour) {
  return Array.isArray(colour) ? colour.map(darker) : DARK[colour] ?? colour;
}

function themedTrace(trace) {
  const themed = {...trace};
  for (const part of ["marker", "line"]) {
    if (themed[part]?.color) themed[part] = {...themed[part], color: darker(themed[part].color)};
  }
  if (trace.fillcolor) themed.fillcolor = darker(trace.fillcolor);
  if (Array.isArray(trace.colorscale)) {
    themed.colorscale = trace.colorscale.map(([place, colour]) => [place, darker(colour)]);
  }
  return themed;
}

function template({ink, grid, line, panel}) {
  const axis = {gridcolor: grid, zerolinecolor: grid, linecolor: line, automargin: true};
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: ink, family: "Roboto, system-ui, 'Liberation Sans', sans-serif", size: 12.5},
      hoverlabel: {bgcolor: panel, bordercolor: line, font: {color: ink}},
      legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
      xaxis: axis,
      yaxis: axis,
    },
  };
}

// One position of a figure's slider.
export function showFrame(data, frame) {
  if (frame.z.length) data[0].z = frame.z;
  frame.traces.forEach((changes, i) => Object.assign(data[i], changes));
}

// Returns plotly's input for a figure in a theme: "light" or "dark".
export function themed(figure, theme) {
  return {
    data: theme === "dark" ? figure.data.map(themedTrace) : figure.data,
    layout: {
      ...figure.layout,
      autosize: true,
      margin: {l: 56, r: 16, t: 10, b: 44},
      template: template(THEMES[theme]),
    },
  };
}
