// Selects the run and the trace, and lists unreadable traces, each with the reason.

import {clear, el, select} from "./dom.js";
import {empty, stageChoice} from "./parts.js";
import {ask} from "./model.js";

// Larger traces are read only when they are selected, not to find out whether they can be read.
const CHECKED_MAX_BYTES = 20 * 2 ** 20;

export class Picker {
  constructor({onChoose, onStage, onChecked}) {
    Object.assign(this, {onChoose, onStage, onChecked});
    this.runs = [];
    this.fields = el("div", {class: "fields"});
    this.broken = el("details", {class: "broken", hidden: true});
    this.element = el("div", {class: "picker"}, this.fields, this.broken);
    this.turn = 0;
  }

  get hasTraces() {
    return this.runs.some((run) => run.traces.some((trace) => trace.state !== "broken"));
  }

  // Several ranks, or unknown: traces of one rank (a repeating schedule writes many) need no comparison.
  manyRanks(name) {
    const traces = (this.runs.find((run) => run.run === name)?.traces ?? []).filter((one) => one.state !== "broken");
    const ranks = new Set(traces.map((one) => one.rank ?? one.trace));
    return ranks.size > 1 || traces.some((one) => one.ranks > 1);
  }

  get chosenTrace() {
    return this.runs.find((run) => run.run === this.chosen.run)?.traces.find((one) => one.trace === this.chosen.trace);
  }

  // Updates the list; returns the run and the trace to show, {} without any.
  async fill(answer, state) {
    const turn = ++this.turn;
    this.answer = answer;
    this.runs = answer.runs;
    this.stage = state.stage;
    this.chosen = await this.firstReadable(state);
    if (turn === this.turn) {
      this.draw();
      this.check(turn);
    }
    return this.chosen;
  }

  // The trace in the address, even if broken: the reason is then shown. Else the first readable trace.
  async firstReadable(state) {
    const run = this.runs.find((one) => one.run === state.run);
    if (run?.traces.some((trace) => trace.trace === state.trace)) return {run: state.run, trace: state.trace};
    for (const one of run ? [run, ...this.runs] : this.runs) {
      for (const trace of one.traces) {
        await this.read(trace, one.run);
        if (trace.state === "ok") return {run: one.run, trace: trace.trace};
      }
    }
    return {};
  }

  async read(trace, run) {
    if (trace.state === "unread") Object.assign(trace, await ask("trace", {run, trace: trace.trace}));
  }

  // Reads the selected trace if necessary, so that its stages can be selected.
  async readChosen(stage) {
    const unread = this.chosenTrace?.state === "unread";
    if (unread) await this.read(this.chosenTrace, this.chosen.run);
    if (!unread && stage === this.stage) return; // keeps the focus
    this.stage = stage;
    this.draw();
  }

  draw() {
    const usable = this.runs.filter((run) => run.traces.some((trace) => trace.state !== "broken")
      || run.run === this.chosen.run);
    clear(this.fields);
    if (usable.length) {
      const run = usable.find((one) => one.run === this.chosen.run) ?? usable[0];
      this.fields.append(
        select("Run", usable.map((one) => [one.run, one.run]), run.run, (name) => this.chooseRun(name)),
        select("Trace", run.traces.map((trace) => [trace.trace, traceLabel(trace, run)]), this.chosen.trace,
          (name) => this.choose(run.run, name)));
      const stages = this.chosenTrace?.stages ?? [];
      const now = stages.includes(this.stage) ? this.stage : stages[0];
      this.fields.append(stageChoice(stages, now, (stage) => {
        this.stage = stage;
        this.onStage(stage);
      }));
    }
    this.drawBroken();
  }

  async chooseRun(name) {
    const found = await this.firstReadable({run: name});
    this.choose(found.run, found.trace);
  }

  choose(run, trace) {
    this.chosen = {run, trace};
    this.stage = undefined;
    this.draw();
    this.onChoose(run, trace);
  }

  drawBroken() {
    const list = this.runs.flatMap((run) => run.traces.filter((trace) => trace.state === "broken")
      .map((trace) => [`${run.run}/${trace.trace}`, trace.reason]));
    this.broken.hidden = !list.length;
    const count = `${list.length} ${list.length === 1 ? "file" : "files"} cannot be read`;
    clear(this.broken).append(el("summary", {}, count), brokenList(list));
  }

  // One after the other, so that a folder of many traces does not block TensorBoard.
  async check(turn) {
    for (const run of this.runs) {
      for (const trace of run.traces) {
        if (turn !== this.turn) return;
        if (trace.state !== "unread" || trace.size_bytes > CHECKED_MAX_BYTES) continue;
        try {
          await this.read(trace, run.run);
        } catch {
          return; // TensorBoard or the file no longer exists: the next reload shows it
        }
        if (trace.state === "broken" && turn === this.turn) this.drawBroken();
      }
    }
    if (turn !== this.turn) return;
    if (!this.element.contains(document.activeElement)) this.draw(); // with the ranks known by now
    this.onChecked();
    this.element.dataset.checked = "true";
  }

  explainEmpty(place) {
    const {logdir} = this.answer;
    const list = this.runs.flatMap((run) => run.traces.map((trace) => [`${run.run}/${trace.trace}`, trace.reason]));
    if (!logdir) {
      place.append(empty("The MoE tab needs a log folder.",
        ["Start TensorBoard with --logdir FOLDER."]));
    } else if (list.length) {
      place.append(empty("No trace here can be read.", ["Each file, and why:"], brokenList(list)));
    } else {
      place.append(empty("No trace was found below the log folder.", [
        "Record one with ", el("code", {}, "moe-trace run --model demo --out FOLDER"), ", or with ",
        el("code", {}, "moe_trace.tensorboard_trace_handler(FOLDER)"),
        " in your own code. Files end in .pt.trace.json or .pt.trace.json.gz. Then press TensorBoard's reload button."],
      el("p", {class: "soft path"}, logdir)));
    }
  }
}

function brokenList(list) {
  return el("ul", {}, ...list.slice(0, 200).map(([name, reason]) =>
    el("li", {}, el("b", {}, name), ": ", reason || "not read yet")));
}

function traceLabel(trace, run) {
  const several = new Set(run.traces.map((one) => one.rank).filter((rank) => rank !== undefined)).size > 1;
  const rank = several && trace.rank !== undefined ? ` (rank ${trace.rank})` : "";
  return `${trace.label}${trace.state === "broken" ? " (cannot be read)" : rank}`;
}
