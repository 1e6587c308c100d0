// Two traces side by side: B is compared with A, the trace chosen above.

import {el, select} from "../dom.js";
import {ask} from "../model.js";
import {empty, figure, isBroken, loading, table, term} from "../parts.js";

const READ_MAX_BYTES = 20 * 2 ** 20; // a larger one is read when it is chosen
const SEPARATOR = "\n"; // stands in no run and no file name of ours

export async function show(place, context) {
  const others = choices(context);
  if (!others.length) {
    place.append(empty("There is only one trace here, so there is nothing to compare it with.",
      ["Record another into a second folder below the log folder, then press TensorBoard's reload button."]));
    return;
  }
  const {run_b: runB, trace_b: traceB} = context.state;
  const named = others.find((one) => one.run === runB && one.trace.trace === traceB);
  const chosen = named ?? await firstOfModel(others, context);
  if (!context.isCurrent()) return;
  const result = el("div", {}, loading("Resampling calls, to tell change from noise."));
  place.append(head(context, others, chosen), result);
  const b = {run_b: chosen.run, trace_b: chosen.trace.trace};
  const answer = await context.ask("compare", {...b, site: context.state.site});
  if (!context.isCurrent() || isBroken(result, answer)) return;
  const cards = answer.map ? [figure(answer.map)] : [];
  const apart = el("p", {class: "panel"}, "No difference map: the two have different numbers of experts.");
  result.replaceChildren(...differences(answer), ...(cards.length ? cards : [apart]), metrics(answer, context));
  await Promise.all(cards.map((card) => card.drawn));
}

function choices({runs, state}) {
  const ordered = [...runs].sort((a, b) => (b.run === state.run) - (a.run === state.run)); // other ranks first
  return ordered.flatMap(({run, traces}) => traces
    .filter((trace) => trace.state !== "broken" && !(run === state.run && trace.trace === state.trace))
    .map((trace) => ({run, trace, key: [run, trace.trace].join(SEPARATOR), label: `${run} / ${trace.label}`})));
}

// B is a trace of A's model if one is found; what was not read yet is asked for, small files only.
async function firstOfModel(others, {runs, state, isCurrent}) {
  const a = runs.find(({run}) => run === state.run)?.traces.find(({trace}) => trace === state.trace);
  for (const other of others) {
    const {run, trace} = other;
    if (trace.state === "unread" && trace.size_bytes < READ_MAX_BYTES) {
      Object.assign(trace, await ask("trace", {run, trace: trace.trace}));
    }
    if (!isCurrent() || (trace.model && trace.model === a?.model)) return other;
  }
  return others.find(({trace}) => trace.state !== "broken") ?? others[0];
}

// What makes the figures below incomparable is said before them.
function differences({models: [a, b], stage, stage_b: stageB}) {
  const words = [];
  if (a !== b) words.push(`The two are of different models: A is ${a}, B is ${b}.`);
  if (stageB && stage !== stageB) words.push(`A shows ${stage ?? "its only stage"}, B ${stageB}.`);
  return words.map((one) => el("p", {class: "panel", role: "status"}, one));
}

function head(context, others, chosen) {
  const options = others.map(({key, label}) => [key, label]);
  const choose = (key) => {
    const [run_b, trace_b] = key.split(SEPARATOR);
    context.go({run_b, trace_b});
  };
  return el("section", {class: "panel sides"},
    el("p", {}, el("b", {}, "A "), `${context.state.run} / ${context.state.trace}`),
    el("p", {}, select("B", options, chosen.key, choose)));
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
