// Two traces side by side: B is compared with A, the trace chosen above.

import {el, select} from "../dom.js";
import {empty, figure, isBroken, loading, table, term} from "../parts.js";

const SEPARATOR = "\n"; // stands in no run and no file name of ours

export async function show(place, context) {
  const others = choices(context);
  if (!others.length) {
    place.append(empty("There is only one trace here, so there is nothing to compare it with.",
      ["Record another into a second folder below the log folder, then press TensorBoard's reload button."]));
    return;
  }
  const {run_b: runB, trace_b: traceB} = context.state;
  const named = others.find(([key]) => key === [runB, traceB].join(SEPARATOR));
  const [chosen] = named ?? others[0];
  const [run_b, trace_b] = chosen.split(SEPARATOR);
  const result = el("div", {}, loading("Resampling calls, to tell change from noise."));
  place.append(head(context, others, chosen), result);
  const answer = await context.ask("compare", {run_b, trace_b, site: context.state.site});
  if (!context.isCurrent() || isBroken(result, answer)) return;
  const cards = answer.map ? [figure(answer.map)] : [];
  const apart = el("p", {class: "panel"}, "No difference map: the two have different numbers of experts.");
  result.replaceChildren(...(cards.length ? cards : [apart]), metrics(answer, context));
  await Promise.all(cards.map((card) => card.drawn));
}

function choices({runs, state}) {
  const ordered = [...runs].sort((a, b) => (b.run === state.run) - (a.run === state.run)); // other ranks first
  return ordered.flatMap((run) => run.traces
    .filter((trace) => trace.state !== "broken" && !(run.run === state.run && trace.trace === state.trace))
    .map((trace) => [[run.run, trace.trace].join(SEPARATOR), `${run.run} / ${trace.label}`]));
}

function head(context, others, chosen) {
  const choose = (key) => {
    const [run_b, trace_b] = key.split(SEPARATOR);
    context.go({run_b, trace_b});
  };
  return el("section", {class: "panel sides"},
    el("p", {}, el("b", {}, "A "), `${context.state.run} / ${context.state.trace}`),
    el("p", {}, select("B", others, chosen, choose)));
}

function metrics(answer, context) {
  const words = `${answer.changed} of ${answer.metrics} metrics changed beyond noise.`
    + (answer.few_calls ? " With fewer than 5 calls on a side, noise cannot be told from change: record more." : "");
  return el("section", {class: "panel", "data-figure": "changes"},
    el("h2", {}, "What changed, with ", term("interval")),
    el("p", {class: "soft"}, words, " Latencies and phases are in µs."),
    el("div", {class: "tools"}, select("Layers",
      answer.sites.map((site) => [site, site === "all" ? "all together" : site]), answer.site,
      (site) => context.go({site}))),
    table(answer.table, "Every metric of A and B with its interval"));
}
