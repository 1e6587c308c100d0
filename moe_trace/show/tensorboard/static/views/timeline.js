// One step as lanes on a time axis to scale, with counters below and the kernels in the visible range.

import {update} from "../chart.js";
import {button, clear, el, select} from "../dom.js";
import {Latest, address} from "../model.js";
import {empty, figure, inGraphs, isBroken, loading, table} from "../parts.js";

const SETTLE_MS = 150;

export async function show(place, context) {
  place.append(loading("Joining kernels with the layers that launched them."));
  const {step, clock, start, end} = context.state;
  const answer = await context.ask("timeline", {step, clock, start, end});
  if (!context.isCurrent() || isBroken(place, answer)) return;
  if (!answer.figure) {
    const why = answer.in_graphs ? inGraphs
      : ["The profiler dropped them, or the routing was recorded without a profiler. Record fewer steps at a time."];
    place.replaceChildren(empty("No call has its ranges in this trace, so there is no timeline.", why),
      download(context.state));
    return;
  }
  const view = new Timeline(context, answer);
  place.replaceChildren(view.card, view.kernels, download(context.state));
  await view.card.drawn;
  view.listen();
  await view.showKernels();
}

class Timeline {
  constructor(context, answer) {
    this.context = context;
    this.answer = answer;
    this.latest = new Latest();
    this.latestKernels = new Latest();
    this.range = [...answer.figure.layout.xaxis.range];
    this.card = figure(answer.figure, {tools: [this.controls()]});
    this.kernels = el("section", {class: "panel kernels", "aria-label": "What ran in the range"});
  }

  controls() {
    const {steps, step, clocks, clock} = this.answer;
    const elsewhere = {start: undefined, end: undefined};
    return el("div", {class: "tools"},
      select("Step", steps.map((one) => [String(one), String(one)]), String(step),
        (value) => this.context.go({step: value, ...elsewhere})),
      select("Clock", clocks.map((one) => [one, one]), clock,
        (value) => this.context.go({clock: value, ...elsewhere})),
      button("◀", () => this.zoom(1, -0.5), {"aria-label": "Earlier"}),
      button("▶", () => this.zoom(1, 0.5), {"aria-label": "Later"}),
      button("+", () => this.zoom(0.5), {"aria-label": "Zoom in"}),
      button("−", () => this.zoom(2), {"aria-label": "Zoom out"}),
      button("Whole step", () => this.set([0, this.answer.length_us])));
  }

  // Mouse and touch: plotly moves the axis itself, and reports it in many small steps.
  listen() {
    this.card.plot.on("plotly_relayout", (change) => {
      const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (!Number.isFinite(range[0]) || !Number.isFinite(range[1])) return;
      this.range = [...range];
      clearTimeout(this.settling);
      this.settling = setTimeout(() => this.moved(), SETTLE_MS);
    });
  }

  zoom(factor, shift = 0) {
    const [from, to] = this.range;
    const width = (to - from) * factor;
    const middle = (from + to) / 2 + shift * (to - from);
    return this.set([middle - width / 2, middle + width / 2]);
  }

  set([from, to]) {
    const whole = this.answer.length_us;
    const width = Math.min(whole, Math.max(to - from, 0.01));
    const left = Math.max(0, Math.min(from, whole - width));
    this.range = [left, left + width];
    return this.moved();
  }

  // The closer the zoom, the finer the pieces into which the server resolves joined ones.
  async moved() {
    const [start, end] = this.range.map((us) => us.toFixed(3));
    const {step, clock} = this.answer;
    this.context.go({step, clock, start, end}, {quiet: true});
    const kernels = this.showKernels();
    const answer = await this.latest.ask(this.context.ask("timeline", {step, clock, start, end}));
    if (!answer?.figure || !this.context.isCurrent()) return;
    const spec = answer.figure;
    spec.layout.xaxis.range = [...this.range];
    await update(this.card.plot, () => spec);
    this.card.setTable(spec.table);
    this.card.setCaption(spec.caption);
    this.card.dataset.range = `${start} ${end}`;
    await kernels;
  }

  async showKernels() {
    const [start, end] = this.range.map((us) => us.toFixed(3));
    const {step, clock} = this.answer;
    const answer = await this.latestKernels.ask(this.context.ask("kernels", {step, clock, start, end}));
    if (!answer || !this.context.isCurrent()) return;
    const words = `${answer.count.toLocaleString("en")} ${answer.what}s touch the range of ${round(start)} to `
      + `${round(end)} µs; together they take ${round(answer.total_us)} µs.`;
    clear(this.kernels).append(el("h2", {}, answer.what === "kernel" ? "Kernels in the range" : "Operators in the range"),
      el("p", {class: "soft", role: "status"}, words));
    if (answer.count) this.kernels.append(table(answer.table, "Time by name and part"));
    this.kernels.dataset.range = `${start} ${end}`;
  }
}

const round = (us) => Number(us).toLocaleString("en", {maximumSignificantDigits: 5});

function download({run, trace}) {
  const link = el("a", {class: "button", href: address("download", {run, trace}), download: trace},
    "Download the trace");
  return el("section", {class: "panel download"}, el("h2", {}, "All events, in Perfetto"), el("p", {}, link),
    el("p", {class: "soft"}, "Then open ui.perfetto.dev, choose “Open trace file” and the downloaded file. Perfetto reads "
      + "it in your browser and sends it nowhere. The process “MoE routing” at the top holds the counters and lanes. "
      + "Without internet: ", el("code", {}, "moe-trace export PATH --to perfetto"),
    " writes a file for an installed trace_processor."));
}
