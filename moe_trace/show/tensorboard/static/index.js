// The MoE tab. TensorBoard imports this module into its own iframe and calls render().

import {connect, onNavigate, onTheme, readState, writeState} from "./host.js";
import {repaint} from "./chart.js";
import {clear, el} from "./dom.js";
import {definitions, loading, problem} from "./parts.js";
import {ask, forget} from "./model.js";
import {Picker} from "./picker.js";
import {show as overview} from "./views/overview.js";
import {show as routing} from "./views/routing.js";
import {show as time} from "./views/time.js";
import {show as timeline} from "./views/timeline.js";
import {show as compare} from "./views/compare.js";
import {show as ranks} from "./views/ranks.js";
import {show as routes} from "./views/routes.js";

const VIEWS = {
  overview: ["Overview", overview],
  routing: ["Routing", routing],
  time: ["Time", time],
  timeline: ["Timeline", timeline],
  compare: ["Compare", compare],
  ranks: ["Ranks", ranks],
  routes: ["Tokens", routes],
};
// State that belongs to one trace and has no meaning in another.
const OF_TRACE = ["stage", "from", "to", "site", "expert", "step", "clock", "start", "end", "page", "slot", "group"];
// Views that only some traces have.
const HAS = {
  ranks: (app) => app.picker.manyRanks(app.state.run),
  routes: (app) => app.picker.chosenTrace?.routes,
};

class App {
  constructor() {
    this.state = readState();
    this.turn = 0; // number of the latest request; older ones are discarded
    this.nav = el("nav", {"aria-label": "Views"});
    this.main = el("main", {id: "main", tabindex: "-1"});
    this.live = el("p", {role: "status", class: "visually-hidden"});
    this.picker = new Picker({
      onChoose: (run, trace) => this.choose(run, trace),
      onStage: (stage) => this.chooseStage(stage),
      onChecked: () => this.drawNav(this.shown),
    });
    document.body.append(
      el("a", {class: "skip", href: "#main", onclick: (e) => this.skip(e)}, "Skip to the view"),
      el("header", {}, this.nav, this.picker.element), this.main, this.live);
  }

  skip(event) {
    event.preventDefault(); // a fragment would be resolved against the plugin's base address
    this.main.focus();
  }

  // Reads the list of runs again and draws the view.
  async refresh(fresh) {
    let runs;
    try {
      runs = await ask("runs", fresh ? {fresh: 1} : {});
    } catch (error) {
      return clear(this.main).append(problem(error.message, () => this.refresh(true)));
    }
    if (runs.error) return clear(this.main).append(problem(runs.error));
    const versions = JSON.stringify(runs.runs.map((run) => [run.run, run.traces.map((t) => [t.trace, t.version])]));
    // TensorBoard reloads every 30 s. If no file has changed, nothing that the user has opened is closed.
    if (fresh && versions === this.versions) return undefined;
    this.versions = versions;
    forget();
    Object.assign(definitions, runs.definitions);
    this.take(await this.picker.fill(runs, this.state));
    return this.draw();
  }

  // Takes the picker's choice, and updates the address if it named another trace, which no longer exists.
  take(chosen) {
    const isGone = this.state.run !== undefined && this.state.trace !== undefined
      && (chosen.run !== this.state.run || chosen.trace !== this.state.trace);
    if (isGone) for (const name of ["run", "trace", ...OF_TRACE]) delete this.state[name];
    Object.assign(this.state, chosen);
    if (isGone) writeState(this.state, false);
  }

  choose(run, trace) {
    const state = {...this.state, run, trace};
    for (const name of OF_TRACE) delete state[name];
    this.go(state, {whole: true});
  }

  // Layer and expert are kept, as they are the same in every stage. The choice of steps is reset.
  chooseStage(stage) {
    const state = {...this.state, stage};
    for (const name of ["from", "to", "step", "start", "end"]) delete state[name];
    this.go(state, {whole: true});
  }

  // Changes the state. `quiet` does not redraw the page, since the view has drawn the change itself.
  go(changes, {quiet = false, whole = false} = {}) {
    const before = this.state.view;
    this.state = whole ? changes : {...this.state, ...changes};
    for (const [name, value] of Object.entries(this.state)) if (value === undefined) delete this.state[name];
    writeState(this.state, !quiet);
    if (quiet) return undefined;
    const moved = this.state.view !== before;
    if (moved) window.scrollTo(0, 0); // focus alone would leave the top of the view below the header
    return this.draw().then(() => moved && this.main.focus({preventScroll: true}));
  }

  async draw() {
    const turn = ++this.turn;
    const name = VIEWS[this.state.view] ? this.state.view : "overview";
    this.shown = name;
    this.drawNav(name);
    const [title, show] = VIEWS[name];
    document.title = `MoE: ${title}`;
    const place = el("div", {class: `view ${name}`});
    clear(this.main).append(el("h1", {class: "visually-hidden"}, title), place);
    if (!this.picker.hasTraces) return this.picker.explainEmpty(place);
    const context = {
      state: {...this.state, view: name},
      runs: this.picker.runs,
      go: (changes, options) => this.go(changes, options),
      chooseStage: (stage) => this.chooseStage(stage),
      isCurrent: () => turn === this.turn,
      ask: (view, parameters = {}) => ask(view,
        {run: this.state.run, trace: this.state.trace, stage: this.state.stage, ...parameters}),
    };
    try {
      place.append(loading("Reading the trace. A large one takes some seconds the first time."));
      await this.picker.readChosen(this.state.stage);
      if (turn !== this.turn) return undefined;
      await show(clear(place), context);
    } catch (error) {
      if (turn === this.turn) clear(place).append(problem(error.message, () => this.draw()));
    }
    if (turn === this.turn) {
      this.live.textContent = `${title} is shown`;
      this.main.dataset.ready = String(turn);
    }
    return undefined;
  }

  drawNav(current) {
    const link = (name) => el("button", {
      type: "button",
      "data-view": name,
      "aria-current": name === current ? "page" : undefined,
      onclick: () => this.go({view: name}),
    }, VIEWS[name][0]);
    const focused = this.nav.contains(document.activeElement);
    const names = Object.keys(VIEWS).filter((name) => !HAS[name] || HAS[name](this) || current === name);
    clear(this.nav).append(...names.map(link));
    if (focused) this.nav.querySelector("[aria-current]")?.focus();
  }
}

// Called by TensorBoard.
export async function render() {
  document.documentElement.lang = "en";
  await new Promise((done) => {
    document.head.append(el("meta", {name: "viewport", content: "width=device-width, initial-scale=1"}),
      el("link", {rel: "icon", href: "data:,"}),
      el("link", {rel: "stylesheet", href: "static/tokens.css"}),
      el("link", {rel: "stylesheet", href: "static/style.css", onload: done, onerror: done}));
  });
  onTheme((theme) => {
    document.documentElement.dataset.theme = theme;
    repaint();
  });
  const app = new App();
  connect({onReload: () => app.refresh(true)});
  onNavigate((state) => { app.state = state; app.refresh(false); });
  await app.refresh(false);
}
