"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function themed(layout) {
    const axis = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--line"), automargin: true };
    return Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), family: "system-ui, 'Liberation Sans', sans-serif", size: 13 },
      margin: { l: 60, r: 20, t: 10, b: 45 },
      legend: Object.assign({ orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, layout.legend),
      xaxis: Object.assign({}, axis, layout.xaxis),
      yaxis: Object.assign({}, axis, layout.yaxis),
    });
  }

  function draw() {
    for (const figure of figures) {
      const place = document.getElementById(figure.id);
      Plotly.react(place, figure.data, themed(figure.layout), config);
    }
  }

  function setTheme(theme) {
    root.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
    draw();
  }

  for (const figure of figures) {
    const slider = document.getElementById(`${figure.id}-step`);
    if (!slider) continue;
    const output = document.getElementById(`${figure.id}-label`);
    slider.addEventListener("input", () => {
      const frame = figure.frames[Number(slider.value)];
      figure.data[0].z = frame.z;
      output.textContent = frame.label;
      slider.setAttribute("aria-valuetext", frame.label);
      Plotly.react(document.getElementById(figure.id), figure.data, themed(figure.layout), config);
    });
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  });
  let before = "light";
  window.addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light"); });
  window.addEventListener("afterprint", () => setTheme(before));
  setTheme(dark.matches ? "dark" : "light");
})();
