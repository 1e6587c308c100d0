// The ranks of a run, as far as their own traces tell.

import {el} from "../dom.js";
import {empty, figure, isBroken, loading, term} from "../parts.js";

export async function show(place, {ask, isCurrent}) {
  place.append(loading("Reading the traces of all ranks, one after the other."));
  const answer = await ask("ranks");
  if (!isCurrent() || isBroken(place, answer)) return;
  if (answer.ranks < 2) {
    place.replaceChildren(empty("This run has traces of one rank only.",
      ["Under torchrun every rank writes its own trace; let all of them write into the same folder."]),
    ...unreadable(answer));
    return;
  }
  const cards = Object.values(answer.figures).map((spec) => figure(spec));
  place.replaceChildren(summary(answer), ...unreadable(answer), el("div", {class: "grid"}, ...cards), allToAll());
  await Promise.all(cards.map((card) => card.drawn));
}

function summary(answer) {
  const {straggler} = answer;
  const words = straggler
    ? [term("straggler"), `: rank ${straggler.rank} does `,
      el("b", {"data-value": straggler.ratio}, `${straggler.ratio.toFixed(2)}×`), " the mean rank's MoE work, ",
      el("b", {"data-value": straggler.excess_us}, `${Math.round(straggler.excess_us).toLocaleString("en")} µs`),
      " more than the mean."]
    : ["The traces have no MoE ranges, so no straggler can be named."];
  const same = answer.same_load
    ? "All ranks saw the same assignments: either they route the same tokens (all-reduce expert parallelism), or one "
      + "trace was copied. Their tokens must not be added up."
    : "The ranks saw different assignments: each routes tokens of its own.";
  return el("section", {class: "panel"}, el("h2", {}, `${answer.ranks} ranks in ${answer.traces} traces`),
    el("p", {}, ...words), el("p", {class: "soft"}, same));
}

function unreadable(answer) {
  return answer.unreadable.length
    ? [el("section", {class: "panel"}, el("h2", {}, "Left out"),
      el("ul", {}, ...answer.unreadable.map((one) => el("li", {}, el("b", {}, one.trace), ": ", one.reason))))]
    : [];
}

function allToAll() {
  return el("section", {class: "panel"}, el("h2", {}, "All-to-all per layer"),
    el("p", {}, "Not shown: the tab does not join the routing to the collectives yet, and the clocks of the ranks are "
      + "not aligned. Which rank waits for which, and how many bytes move, cannot be read from here."),
    el("p", {class: "soft"}, "The Timeline of each rank shows its dispatch and combine phases, which hold the "
      + "all-to-all."));
}
