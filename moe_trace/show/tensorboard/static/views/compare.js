// Two traces side by side: B is compared with A, the trace chosen above.

import {el, select} from "../dom.js";
import {ask} from "../model.js";
import {empty, figure, isBroken, loading, stageChoice, table, term} from "../parts.js";

const READ_MAX_BYTES = 20 * 2 ** 20; // larger traces are read when they are selected
const SEPARATOR = "\n"; // occurs in no run and no file name of ours

export async function show(place, context) {
  const others = choices(context);
  if (!others.length) {
    place.append(empty("There is only one trace here, so there is nothing to compare it with.",
      ["Record another into a second folder below the log folder, then press TensorBoard's reload button."]));
    return;
  }
  const {run_b: runB, trace_b: traceB, stage_b: stageB} = context.state;
  const named = others.find((one) => one.run === runB && one.trace.trace === traceB);
  const chosen = named ?? await firstOfModel(others, context);
  await read(chosen);
  if (!context.isCurrent()) return;
  const result = el("div", {}, loading("Resampling steps, to tell change from noise."));
  place.append(head(context, others, chosen), result);
  const b = {run_b: chosen.run, trace_b: chosen.trace.trace, stage_b: stageB};
  const answer = await context.ask("compare", {...b, site: context.state.site});
  if (!context.isCurrent() || isBroken(result, answer)) return;
  const cards = answer.map ? [figure(answer.map)] : [];
  result.replaceChildren(...differences(answer), ...cards, ...routing(answer),
    ...(answer.metrics ? [metrics(answer, context)] : []));
  await Promise.all(cards.map((card) => card.drawn));
}

async function read({run, trace}) {
  if (trace.state === "unread") Object.assign(trace, await ask("trace", {run, trace: trace.trace}));
}

function choices({runs, state}) {
  const ordered = [...runs].sort((a, b) => (b.run === state.run) - (a.run === state.run)); // other ranks first
  return ordered.flatMap(({run, traces}) => traces
    .filter((trace) => trace.state !== "broken" && !(run === state.run && trace.trace === state.trace))
    .map((trace) => ({run, trace, key: [run, trace.trace].join(SEPARATOR), label: `${run} / ${trace.label}`})));
}

const traceOf = ({runs, state}) =>
  runs.find(({run}) => run === state.run)?.traces.find(({trace}) => trace === state.trace);

// B is a trace of A's model if one is found; traces not read yet are requested if they are small.
async function firstOfModel(others, context) {
  const a = traceOf(context);
  for (const other of others) {
    if (other.trace.size_bytes < READ_MAX_BYTES) await read(other);
    if (!context.isCurrent() || (other.trace.model && other.trace.model === a?.model)) return other;
  }
  return others.find(({trace}) => trace.state !== "broken") ?? others[0];
}

// Describes both traces, and differences that make the metrics below hard to compare.
function differences(answer) {
  const list = (items) => el("ul", {}, ...items.map((words) => el("li", {}, words)));
  return [el("section", {class: "panel", "data-figure": "setup"}, el("h2", {}, "What changed"),
    el("p", {role: "status", class: "sentence"}, answer.headline),
    answer.notes.length ? list(answer.notes) : undefined,
    answer.setup.rows.length ? table(answer.setup, "Set-up: what differs")
      : el("p", {class: "soft"}, "No difference of the set-up is recorded."))];
}

function head(context, others, chosen) {
  const options = others.map(({key, label}) => [key, label]);
  const choose = (key) => {
    const [run_b, trace_b] = key.split(SEPARATOR);
    context.go({run_b, trace_b, stage_b: undefined});
  };
  const a = stagesOf(traceOf(context), context.state.stage);
  const b = stagesOf(chosen.trace, context.state.stage_b ?? a.now);
  return el("section", {class: "panel sides"},
    el("p", {class: "tools"}, el("span", {}, el("b", {}, "A "), `${context.state.run} / ${context.state.trace}`),
      a.choice((stage) => context.chooseStage(stage))),
    el("p", {class: "tools"}, select("B", options, chosen.key, choose),
      b.choice((stage_b) => context.go({stage_b}))));
}

// Returns the stage to show of a trace: the wanted one, if it has it.
function stagesOf(trace, wanted) {
  const stages = trace?.stages ?? [];
  const now = stages.includes(wanted) ? wanted : stages[0];
  return {now, choice: (onchoose) => stageChoice(stages, now, onchoose)};
}

function routing(answer) {
  return answer.routing.rows.length ? [el("section", {class: "panel", "data-figure": "routing-changes"},
    el("h2", {}, "Routing, layer by layer"),
    el("p", {class: "soft"}, "How much of a layer's assignments went to other experts, beside what 99 of 100 "
      + "comparisons of the same thing stay under; the experts that gained and lost most, in percentage points."),
    table(answer.routing, "Routing of each layer in A and B"))] : [];
}

function metrics(answer, context) {
  return el("section", {class: "panel", "data-figure": "changes"},
    el("h2", {}, "Figures, with ", term("interval")),
    el("p", {class: "soft"}, `${answer.changed} of ${answer.metrics} metrics changed beyond noise. `
      + "Times are in µs."),
    el("div", {class: "tools"}, select("Layers",
      answer.sites.map((site) => [site, site === "all" ? "all together" : site]), answer.site,
      (site) => context.go({site}))),
    table(answer.table, "Every metric of A and B with its interval"));
}
