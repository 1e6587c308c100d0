// The ranks of a run: combined, where their traces share collectives, and side by side from their own traces.

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
  const exchange = cardsOf(answer.together);
  const own = cardsOf(answer);
  place.replaceChildren(summary(answer), ...unreadable(answer), ...together(answer.together),
    el("div", {class: "grid"}, ...exchange),
    own.length ? el("h2", {class: "section"}, "Each rank by its own trace") : "",
    el("div", {class: "grid"}, ...own));
  await Promise.all([...exchange, ...own].map((card) => card.drawn));
}

function cardsOf(part) {
  return Object.values(part?.figures ?? {}).map((spec) => figure(spec));
}

function summary(answer) {
  return el("section", {class: "panel"}, el("h2", {}, `${answer.ranks} ranks in ${traces(answer.traces)}`),
    ...straggler(answer));
}

const EVEN = 1.01; // below it, the slowest rank is not worth reporting

const traces = (count) => (count === 1 ? "one merged trace" : `${count} traces`);

function straggler(answer) {
  if (answer.same_load === undefined) return []; // a merged trace has no summary of each rank
  const slowest = answer.straggler;
  const words = slowest && slowest.ratio < EVEN
    ? ["Every rank does the same MoE work, to within 1 %: there is no ", term("straggler"), "."]
    : slowest
    ? [term("straggler"), `: rank ${slowest.rank} does `,
      el("b", {"data-value": slowest.ratio}, `${slowest.ratio.toFixed(2)}×`), " the mean rank's MoE work, ",
      el("b", {"data-value": slowest.excess_us}, `${Math.round(slowest.excess_us).toLocaleString("en")} µs`),
      " more than the mean."]
    : [answer.waits_inside
      ? "The MoE work of these traces has the waiting for other ranks in it, so it names no straggler."
      : "The traces have no MoE ranges, so no straggler can be named."];
  if (answer.together) return [el("p", {}, ...words)]; // which says which ranks route the same tokens
  const same = answer.same_load
    ? "All ranks saw the same assignments: either they route the same tokens (all-reduce expert parallelism), or one "
      + "trace was copied. Their tokens must not be added up."
    : "The ranks saw different assignments: each routes tokens of its own.";
  return [el("p", {}, ...words), el("p", {class: "soft"}, same)];
}

function unreadable(answer) {
  return answer.unreadable.length
    ? [el("section", {class: "panel"}, el("h2", {}, "Left out"),
      el("ul", {}, ...answer.unreadable.map((one) => el("li", {}, el("b", {}, one.trace), ": ", one.reason))))]
    : [];
}

// Load, waiting, clocks and bytes, in the words of the report.
function together(report) {
  if (!report) return [];
  const missing = report.has_exchange ? [] : [el("p", {class: "soft"},
    "Not shown: the traces hold no collective of the MoE layers, so bytes and waiting cannot be read from them.")];
  return [el("section", {class: "panel"}, el("h2", {}, "The ranks together"),
    el("ul", {}, ...report.sentences.map((words) => el("li", {}, words))), ...missing)];
}
