// Facts, five cards, and the findings, worst first, each with the way to the view that shows it.

import {button, el, marked} from "../dom.js";
import {facts, figureNumber, isBroken, loading, term} from "../parts.js";

const TITLES = {routing: "Routing", time: "Time"};

export async function show(place, {ask, go, isCurrent, state}) {
  place.append(loading("Reading the trace. A large one takes some seconds the first time."));
  const answer = await ask("overview");
  if (!isCurrent() || isBroken(place, answer)) return;
  place.replaceChildren(
    el("section", {"aria-label": "Figures to look at first", class: "cards"}, ...answer.cards.map((c) => card(c, go))),
    el("section", {class: "panel"}, el("h2", {}, "Findings, worst first"), findings(answer, go),
      answer.phases && el("p", {class: "soft"}, answer.phases)),
    el("section", {class: "panel"}, el("h2", {}, `Run ${state.run}`), facts(answer.facts)));
  if (answer.notes.length) {
    place.append(el("section", {class: "panel"}, el("h2", {}, "Notes"),
      el("ul", {}, ...answer.notes.map((note) => el("li", {}, note)))));
  }
}

function card(content, go) {
  return el("div", {class: "card", "data-card": content.label}, el("p", {class: "label"}, term(content.label)),
    figureNumber(content, "p"), el("p", {class: "soft"}, content.detail),
    button(`Show in ${TITLES[content.view]}`, () => go({view: content.view, site: content.site ?? undefined}), {class: "link"}));
}

function findings(answer, go) {
  if (!answer.findings.length) return el("p", {class: "soft"}, "No rule found anything to look at.");
  const items = answer.findings.map((finding) => {
    const target = {view: finding.view, site: finding.view === "routing" ? finding.site ?? undefined : undefined};
    return el("li", {"data-rule": finding.rule}, el("span", {class: "sentence"}, ...marked(finding.sentence)), " ",
      el("span", {class: "soft"}, ...marked(finding.advice)), " ",
      button(`Show in ${TITLES[finding.view]}`, () => go(target),
        {class: "link", "aria-label": `Show in ${TITLES[finding.view]}: ${finding.sentence}`}));
  });
  const more = answer.more_findings;
  return el("div", {}, el("ol", {class: "findings"}, ...items),
    more ? el("p", {class: "soft"}, `… and ${more} more; moe-trace report lists all.`) : "");
}
