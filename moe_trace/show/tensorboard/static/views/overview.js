// Facts, five cards, and the findings, worst first, each with a link to the view that shows it.

import {button, el, marked} from "../dom.js";
import {facts, figureNumber, isBroken, loading, term} from "../parts.js";

const TITLES = {routing: "Routing", time: "Time"};

export async function show(place, {ask, go, isCurrent, state}) {
  place.append(loading("Adding up the trace."));
  const answer = await ask("overview");
  if (!isCurrent() || isBroken(place, answer)) return;
  const chosenFirst = [...answer.stages].sort((a, b) => (b.stage === state.stage) - (a.stage === state.stage));
  place.replaceChildren(...chosenFirst.flatMap((part) => stage(part, go)),
    el("section", {class: "panel"}, el("h2", {}, `Run ${state.run}`), facts(answer.facts)));
  if (answer.of_run.shown.length) {
    place.append(el("section", {class: "panel"}, el("h2", {}, "Findings about the run as a whole"),
      findings(answer.of_run, go)));
  }
  if (answer.notes.length) {
    place.append(el("section", {class: "panel"}, el("h2", {}, "Notes"),
      el("ul", {}, ...answer.notes.map((note) => el("li", {}, note)))));
  }
}

// Cards and findings of one stage, without a heading if the trace has no other.
function stage(part, go) {
  const show = (target) => go({...target, stage: part.stage || undefined});
  const name = part.stage ? `${part.stage[0].toUpperCase()}${part.stage.slice(1)}` : "";
  return [
    name && el("h2", {class: "section", "data-stage": part.stage}, name, " ", el("span", {class: "soft"}, part.counted)),
    el("section", {"aria-label": `${name} figures to look at first`.trim(), class: "cards"},
      ...part.cards.map((c) => card(c, show))),
    el("section", {class: "panel"}, el("h2", {}, "Findings, worst first"), findings(part.findings, show),
      part.phases && el("p", {class: "soft"}, part.phases)),
  ].filter(Boolean);
}

function card(content, go) {
  return el("div", {class: "card", "data-card": content.label}, el("p", {class: "label"}, term(content.label)),
    figureNumber(content, "p"), el("p", {class: "soft"}, content.detail),
    button(`Show in ${TITLES[content.view]}`, () => go({view: content.view, site: content.site ?? undefined}), {class: "link"}));
}

function findings({shown, more}, go) {
  if (!shown.length) return el("p", {class: "soft"}, "No rule found anything to look at.");
  const items = shown.map((finding) => {
    const target = {view: finding.view, site: finding.view === "routing" ? finding.site ?? undefined : undefined};
    return el("li", {"data-rule": finding.rule}, el("span", {class: `severity ${finding.severity}`}, finding.price), " ",
      el("span", {class: "sentence"}, ...marked(finding.sentence)), " ",
      el("span", {class: "soft"}, ...marked(finding.advice)), " ",
      button(`Show in ${TITLES[finding.view]}`, () => go(target),
        {class: "link", "aria-label": `Show in ${TITLES[finding.view]}: ${finding.sentence}`}));
  });
  return el("div", {}, el("ol", {class: "findings"}, ...items),
    more ? el("p", {class: "soft"}, `… and ${more} more; moe-trace report lists all.`) : "");
}
