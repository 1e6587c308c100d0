// The tokens of a trace's file of routes in the colours of their experts, and the figures of their study.

import {update} from "../chart.js";
import {el, freshId, select} from "../dom.js";
import {askOnce} from "../model.js";
import {empty, figure, isBroken, loading} from "../parts.js";
import {showFrame} from "../theme.js";
import {tokens} from "../tokens.js";

export async function show(place, context) {
  const {state, ask, go, isCurrent} = context;
  const {run, trace, group} = state;
  place.append(loading("Reading the routes."));
  const answer = await ask("routes", {group});
  if (!isCurrent() || isBroken(place, answer)) return;
  if (answer.missing) {
    place.replaceChildren(empty("Beside this trace lies no file of routes.",
      ["Record them with moe_trace.MoETracer(model, routes=True) or moe-trace run --routes; they are saved as the "
        + "trace's name with .routes.npz."]));
    return;
  }
  const view = tokens(answer.header, (page) => askOnce("routes_page", {run, trace, group, page}),
    {state, tell: (changes) => isCurrent() && go(changes, {quiet: true})});
  const groups = answer.groups.length > 1
    ? [select("Layers", answer.groups.map((name, i) => [String(i), name]), group ?? "0", (i) => go({group: i, page: undefined}))]
    : [];
  const below = el("div", {class: "study"}, loading("Studying the routes."));
  place.replaceChildren(el("h2", {class: "section"}, "Tokens"), ...groups, ...answer.notes.map((note) => el("p", {class: "soft"}, note)), view.element, below);
  await view.ready;
  if (!isCurrent()) return;
  const studied = await askOnce("routes_study", {run, trace, group});
  if (!isCurrent() || isBroken(below, studied)) return;
  const compared = studied.compared.map(card);
  const cards = studied.figures.map(card);
  below.replaceChildren(...(compared.length ? [el("h2", {class: "section"}, "The files of this run"),
    el("div", {class: "grid"}, ...compared)] : []),
  el("h2", {class: "section"}, "What the routes say"),
    studied.note && el("p", {class: "soft"}, studied.note), el("div", {class: "grid"}, ...cards));
  await Promise.all([...compared, ...cards].map((one) => one.drawn));
}

// A figure whose slider has a position for each layer.
function card(spec) {
  if (!spec.frames.length) return figure(spec);
  const id = freshId("frame");
  const output = el("output", {for: id}, spec.frames[0].label);
  const slider = el("input", {type: "range", id, min: 0, max: spec.frames.length - 1, step: 1, value: 0,
    "aria-valuetext": spec.frames[0].label, oninput: () => {
      const frame = spec.frames[Number(slider.value)];
      output.textContent = frame.label;
      slider.setAttribute("aria-valuetext", frame.label);
      update(made.plot, (now) => {
        const data = now.data.map((trace) => ({...trace}));
        showFrame(data, frame);
        return {...now, data};
      });
    }});
  const made = figure(spec, {tools: [el("div", {class: "tools"},
    el("span", {class: "field grow"}, el("label", {for: id}, spec.slider), slider, output))]});
  return made;
}
