// Elements shared by several views: labels with definitions, facts, tables, figures, and the three states.

import {draw} from "./chart.js";
import {button, el, freshId, select} from "./dom.js";

export const definitions = {};

// A label. Its definition, if any, is shown on hover and on focus.
export function term(label, words = definitions[label]) {
  if (!words) return el("span", {}, label);
  const id = freshId("tip");
  const tip = el("span", {role: "tooltip", id, class: "tip"}, words);
  const word = el("button", {type: "button", class: "term", "aria-describedby": id}, label);
  const holder = el("span", {class: "defined"}, word, tip);
  const place = () => placeTip(word, tip);
  word.addEventListener("mouseenter", place);
  word.addEventListener("focus", place);
  word.addEventListener("keydown", (event) => { if (event.key === "Escape") word.blur(); });
  return holder;
}

// Fixed to the window, since scrolling tables would clip it.
function placeTip(word, tip) {
  const box = word.getBoundingClientRect();
  const width = Math.min(320, window.innerWidth - 24);
  tip.style.width = `${width}px`;
  tip.style.left = `${Math.max(8, Math.min(box.left, window.innerWidth - width - 12))}px`;
  const below = box.bottom + 6;
  const fits = below + tip.offsetHeight < window.innerHeight;
  tip.style.top = `${fits ? below : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}

// A number carries its value and its path in the report's JSON.
export function figureNumber(fact, tag = "dd") {
  return el(tag, {"data-value": fact.value, "data-path": fact.path, "data-label": fact.label}, fact.text);
}

export function facts(list) {
  return el("dl", {class: "facts"},
    ...list.map((fact) => el("div", {}, el("dt", {}, term(fact.label)), figureNumber(fact))));
}

export function table(content, caption, {rowHead} = {}) {
  const isText = (i) => content.rows.some((row) => typeof row[i] === "string" && row[i] !== "-");
  const head = content.headings.map((heading, i) =>
    el("th", {scope: "col", class: isText(i) ? "text" : "number"}, term(heading, content.definitions?.[i])));
  const rows = content.rows.map((row) => el("tr", {}, ...row.map((cell, i) => {
    const isNumber = Array.isArray(cell);
    const text = isNumber ? cell[0] : cell;
    const inside = i === 0 && rowHead ? rowHead(text) : text;
    return el(i === 0 ? "th" : "td", {
      scope: i === 0 ? "row" : undefined,
      class: isText(i) ? "text" : "number",
      "data-value": isNumber ? cell[1] : undefined,
      title: !isNumber && text.length > 40 ? text : undefined,
    }, inside);
  })));
  const more = content.more ? el("p", {class: "soft"}, `… and ${content.more} more.`) : undefined;
  return el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption},
    el("table", {}, el("caption", {class: "visually-hidden"}, caption),
      el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)), more);
}

// A plot with its title, caption and table. `tools` are placed between caption and plot.
export function figure(spec, {tools = [], onclick, open = false, rowHead} = {}) {
  const id = freshId("figure");
  const plot = el("div", {class: "plot", role: "img", "aria-label": `${spec.title}. ${spec.caption}`});
  const caption = el("figcaption", {}, spec.caption);
  const holder = el("div", {class: "table-holder"}, table(spec.table, `${spec.title}, table`, {rowHead}));
  const card = el("figure", {"data-figure": spec.key, "aria-labelledby": id},
    el("h2", {id}, spec.title), caption, ...tools, plot,
    el("details", {open, ontoggle: () => card.fillTable()}, el("summary", {}, "The same as a table"), holder));
  let latest; // hidden tables are not built: a slider changes them many times a second
  card.fillTable = () => {
    if (!latest || !holder.parentElement.open) return;
    holder.replaceChildren(table(latest, `${spec.title}, table`, {rowHead}));
    latest = undefined;
  };
  card.plot = plot;
  card.drawn = draw(plot, spec, onclick);
  card.setTable = (content) => {
    latest = content;
    card.fillTable();
  };
  card.setCaption = (words) => { caption.textContent = words; };
  return card;
}

// A choice of the stage, or only its name if the trace has a single one.
export function stageChoice(stages, now, onchoose) {
  if (stages.length > 1) return select("Stage", stages.map((stage) => [stage, stage]), now, onchoose);
  return stages.length ? el("span", {class: "field", "data-stage": now}, el("span", {class: "soft"}, "Stage"), now) : "";
}

// -- states -----------------------------------------------------------------------------------------------

export function loading(words) {
  return el("p", {class: "state loading", role: "status"}, el("span", {class: "spinner", "aria-hidden": "true"}),
    words);
}

export function empty(words, advice, ...more) {
  return el("div", {class: "state"}, el("p", {class: "lead"}, words), el("p", {class: "soft"}, ...advice), ...more);
}

export const inGraphs = ["Compiled code and CUDA graphs open no ranges. The trace's own timeline has them, and routers and "
  + "experts where their kernels are known: moe-trace view TRACE, or torch-tb-profiler's Trace view."];

export function problem(words, retry) {
  return el("div", {class: "state problem", role: "alert"}, el("p", {class: "lead"}, "This view cannot be shown."),
    el("p", {}, words), retry && button("Try again", retry));
}

// Returns true, and shows the reason on the page, if the trace itself cannot be read.
export function isBroken(place, answer) {
  const words = answer.broken || answer.error;
  if (!words) return false;
  place.replaceChildren(el("div", {class: "state problem", role: "alert"},
    el("p", {class: "lead"}, "This trace cannot be read."), el("p", {}, words),
    el("p", {class: "soft"}, "Choose another trace above. TensorBoard's reload button reads this one again.")));
  return true;
}
