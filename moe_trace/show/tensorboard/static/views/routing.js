// The heat map of layers × experts over selected steps, and one layer in detail.

import {update} from "../chart.js";
import {button, clear, el, freshId, select} from "../dom.js";
import {Latest, askOnce} from "../model.js";
import {empty, facts, figure, isBroken, loading} from "../parts.js";

const PLAY_MS = 250;
const SETTLE_MS = 250;

export async function show(place, context) {
  place.append(loading("Adding up who got which tokens."));
  const answer = await context.ask("routing");
  if (!context.isCurrent() || isBroken(place, answer)) return;
  if (!answer.map) {
    place.replaceChildren(empty("No assignment was recorded in this trace.",
      ["The routers were found, but none was called while the profiler recorded. Record more steps."]));
    return;
  }
  const view = new Routing(context, answer);
  const overTime = Object.values(answer.over_time).map((spec) => figure(spec));
  place.replaceChildren(view.card, ...overTime, view.detail);
  if (view.isChosen) view.moved();
  context.state.site ??= answer.worst ?? answer.sites[0]; // the page should not open with an empty half
  await Promise.all([view.card.drawn, ...overTime.map((card) => card.drawn), view.showLayer()]);
}

class Routing {
  constructor(context, answer) {
    this.context = context;
    this.steps = answer.steps;
    this.sites = answer.sites;
    this.worst = answer.worst ?? answer.sites[0];
    this.latest = new Latest();
    this.detail = el("section", {class: "detail", "aria-label": "One layer", tabindex: "-1"});
    this.latestLayer = new Latest();
    const last = this.steps.length - 1;
    const inside = (text, fallback) => Math.max(0, Math.min(last, Number.parseInt(text ?? fallback, 10) || 0));
    this.from = inside(context.state.from, 0);
    this.to = Math.max(this.from, inside(context.state.to, last));
    this.card = figure(answer.map, {
      tools: [this.controls()],
      onclick: (row, column) => this.choose(this.sites[row], column),
      rowHead: (site) => button(site, () => this.choose(site), {class: "link"}),
    });
    this.card.id = "routing-map";
  }

  get isChosen() {
    return this.from > 0 || this.to < this.steps.length - 1;
  }

  // -- which steps ----------------------------------------------------------------------------------------

  controls() {
    const [slider, width] = [freshId("step"), freshId("width")];
    const last = this.steps.length - 1;
    this.slider = el("input", {type: "range", id: slider, min: 0, max: last, step: 1,
      oninput: () => this.move(Number(this.slider.value))});
    this.width = el("input", {type: "number", id: width, min: 1, max: last + 1, value: 1,
      onchange: () => this.move(this.from)});
    this.output = el("output", {for: `${slider} ${width}`});
    this.playButton = button("Play", () => this.play());
    this.allButton = button("All steps", () => this.all());
    if (this.isChosen) this.width.value = this.to - this.from + 1;
    this.say();
    return el("div", {class: last < 1 ? "tools one-step" : "tools"},
      this.allButton, this.playButton,
      el("span", {class: "field grow"}, el("label", {for: slider}, "Step"), this.slider, this.output),
      el("span", {class: "field"}, el("label", {for: width}, "Steps at a time"), this.width),
      select("Layer", this.sites.map((site) => [site, site]),
        this.context.state.site ?? this.worst, (site) => this.choose(site)));
  }

  say() {
    const words = this.isChosen
      ? (this.from === this.to ? `step ${this.steps[this.from]}`
        : `steps ${this.steps[this.from]} to ${this.steps[this.to]}`)
      : "all steps";
    this.output.textContent = words;
    this.slider.value = this.from;
    this.slider.setAttribute("aria-valuetext", words);
    this.allButton.setAttribute("aria-pressed", String(!this.isChosen));
  }

  move(position) {
    const last = this.steps.length - 1;
    const width = Math.max(1, Math.min(last + 1, Number.parseInt(this.width.value, 10) || 1));
    this.width.value = width;
    this.from = Math.max(0, Math.min(position, last + 1 - width));
    this.to = this.from + width - 1;
    return this.moved();
  }

  all() {
    this.stop();
    [this.from, this.to] = [0, this.steps.length - 1];
    return this.moved();
  }

  async moved() {
    this.say();
    const steps = this.range();
    this.context.go(steps, {quiet: true});
    const {run, trace, stage} = this.context.state;
    const answer = await this.latest.ask(
      askOnce("heat", {run, trace, stage, from: steps.from ?? 0, to: steps.to ?? this.steps.length - 1}));
    if (!answer || !answer.z) return;
    await update(this.card.plot, (spec) => ({...spec, data: [{...spec.data[0], z: answer.z}]}));
    this.card.setTable(answer.table);
    this.card.dataset.steps = `${this.from}-${this.to}`;
    if (!this.timer) this.settle();
  }

  // The layer is drawn when the slider rests, since drawing it at each step would block the slider.
  settle() {
    clearTimeout(this.settling);
    this.settling = setTimeout(() => { if (this.site && this.context.isCurrent()) this.showLayer(); }, SETTLE_MS);
  }

  range() {
    return this.isChosen ? {from: this.from, to: this.to} : {from: undefined, to: undefined};
  }

  play() {
    if (this.timer) return this.stop();
    this.playButton.textContent = "Pause";
    if (!this.isChosen || this.to >= this.steps.length - 1) this.from = -1;
    const next = async () => {
      if (!this.context.isCurrent() || !this.timer) return;
      await this.move(this.from + 1);
      if (this.to >= this.steps.length - 1) this.stop();
      else if (this.timer) this.timer = setTimeout(next, PLAY_MS);
    };
    this.timer = setTimeout(next, 0);
    return undefined;
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = undefined;
    this.playButton.textContent = "Play";
    this.settle();
  }

  // -- one layer ------------------------------------------------------------------------------------------

  async choose(site, expert) {
    this.context.go({site, expert}, {quiet: true});
    this.context.state.site = site;
    this.context.state.expert = expert;
    this.card.querySelector(".tools select").value = site;
    await this.showLayer();
    this.detail.focus({preventScroll: true});
    this.detail.scrollIntoView({block: "nearest"});
  }

  async showLayer() {
    this.site = this.context.state.site;
    if (!this.detail.childElementCount) this.detail.append(loading(`Looking into ${this.site}.`));
    const answer = await this.latestLayer.ask(this.context.ask("layer", {site: this.site, ...this.range()}));
    if (!answer || !this.context.isCurrent() || isBroken(this.detail, answer)) return;
    const {sorted, ...others} = answer.figures;
    if (sorted) sorted.title = `Load, sorted (${this.output.textContent})`;
    if (sorted && this.sorted?.isConnected && this.detail.dataset.site === answer.site) return this.showSorted(sorted);
    clear(this.detail).append(el("h2", {class: "section"}, `Layer ${answer.site}, all steps`), facts(answer.facts));
    this.sorted = undefined;
    if (sorted) {
      this.expert = oneExpert(sorted, this.context.state.expert);
      this.sorted = figure(sorted);
      this.detail.append(this.expert, this.sorted);
    }
    const cards = Object.values(others).map((spec) => figure(spec));
    this.detail.append(el("div", {class: "grid"}, ...cards));
    await Promise.all(cards.map((card) => card.drawn));
    this.detail.dataset.site = answer.site;
    return undefined;
  }

  // Only the sorted load depends on the selected steps; the layer's other figures do not change.
  async showSorted(sorted) {
    const expert = oneExpert(sorted, this.context.state.expert);
    this.expert.replaceWith(expert);
    this.expert = expert;
    await this.sorted.drawn;
    await update(this.sorted.plot, () => sorted);
    this.sorted.querySelector("h2").textContent = sorted.title;
    this.sorted.setTable(sorted.table);
    this.sorted.setCaption(sorted.caption);
  }
}

// Shows the expert whose cell was clicked, and its bar.
function oneExpert(sorted, expert) {
  const [bars] = sorted.data;
  const place = expert === undefined ? -1 : bars.x.indexOf(String(expert));
  if (place < 0) return el("p", {hidden: true});
  bars.marker = {...bars.marker, line: {width: bars.x.map((_, i) => (i === place ? 2.5 : 0)), color: "#D81B60"}};
  const words = `Expert ${expert}: ${bars.customdata[place].toLocaleString("en")} assignments, `
    + `${bars.y[place].toPrecision(3)}× equal share, place ${place + 1} of ${bars.x.length}.`;
  return el("p", {class: "expert", role: "status"}, words);
}
