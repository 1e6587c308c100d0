// Follows theme.js, dom.js and tokens.js in one module script.

const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };

function drawOne(figure) {
  const {data, layout} = themed(figure, root.dataset.theme);
  Plotly.react(document.getElementById(figure.id), data, layout, config);
}

function draw() {
  figures.forEach(drawOne);
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
    showFrame(figure.data, frame);
    output.textContent = frame.label;
    slider.setAttribute("aria-valuetext", frame.label);
    drawOne(figure);
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

// The tokens of each group of layers, whose pages are embedded in this file.
for (const {id, header, pages} of JSON.parse(document.getElementById("routes").textContent)) {
  document.getElementById(id).append(tokens(header, async (i) => pages[i]).element);
}
