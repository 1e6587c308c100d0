// The text of a run with each token in the colour of its expert, for the tab and the HTML page; never as HTML.
//
// `header` is the data of all pages (show/routes/tokens.py); `load(i)` returns a page. `state` is the initial state,
// and `tell(changes)` is called with the user's choices.

import {button, clear, el, freshId} from "./dom.js";

const PADDING = 1;
const RECOMPUTED = 2;
const CONTEXT = 8; // tokens on each side of one in the list
const LISTED_MAX = 60;
const FREQUENT_MAX = 12;
const TYPES = {int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array};

// -- data -------------------------------------------------------------------------------------------------

// Returns a page's columns as typed arrays.
async function unpack(page) {
  const bytes = Uint8Array.from(atob(page.data), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const columns = {};
  let at = 0;
  for (const [name, type, size] of page.columns) {
    columns[name] = new TYPES[type](buffer, at, size);
    at += columns[name].byteLength;
  }
  return {...page, ...columns, words: new Map(Object.entries(page.words))};
}

function half(bits) { // a float16
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

// Characters that are invisible or move their neighbours: controls, directional marks, zero-width blanks.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;
const NAMED = {"\n": "⏎", "\t": "⇥"};

function visible(text) {
  const shown = text.replace(UNSEEN, (character) => {
    const code = character.codePointAt(0);
    return NAMED[character] ?? `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
  return shown.length > 80 ? `${shown.slice(0, 79)}…` : shown;
}

const count = (number) => number.toLocaleString("en");
const percent = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)} %` : "-");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

const hue = (expert) => ((expert * 137.508 + 210) % 360).toFixed(1);

// Neighbouring experts differ strongly in hue, and have one of three degrees of lightness.
function paint(element, expert) {
  element.style.setProperty("--hue", hue(expert));
  element.style.setProperty("--step", String((expert % 3) - 1));
}

// -- the view ---------------------------------------------------------------------------------------------

class Tokens {
  constructor(header, load, {state = {}, tell = () => {}} = {}) {
    Object.assign(this, {header, load, tell});
    this.slots = Math.max(1, ...header.top_k);
    const within = (text, most) => Math.max(0, Math.min(most, Number.parseInt(text, 10) || 0));
    const layer = header.layers.indexOf(state.site);
    this.layer = layer < 0 ? 0 : layer;
    this.slot = within(state.slot, this.slots - 1);
    this.index = within(state.page, header.pages.length - 1);
    this.expert = state.expert === undefined || state.expert === "" ? undefined : Number(state.expert);
    if (!(this.expert < header.num_experts[this.layer])) this.expert = undefined;
    this.turn = 0;
    this.build();
  }

  build() {
    this.pageSlider = this.slider("Page", this.header.pages.length, this.index, (i) => this.turnTo(i));
    this.layerSlider = this.slider("Layer", this.header.layers.length, this.layer, (i) => this.chooseLayer(i));
    this.slotSlider = this.slider("Slot", this.slots, this.slot, (i) => this.chooseSlot(i));
    this.legend = el("div", {class: "experts", role: "group", "aria-label": "Experts of the layer"});
    this.legendHead = el("p", {class: "soft"});
    this.keys = el("p", {class: "soft keys"});
    this.text = el("div", {class: "tokens", tabindex: "0", role: "group", "aria-describedby": "tokens-help",
      "aria-label": "Tokens", onkeydown: (event) => this.key(event),
      onpointerover: (event) => this.point(event.target), onpointerleave: () => this.showPath(this.current),
      onclick: (event) => this.choose(event.target)});
    this.path = el("section", {class: "panel path-panel", "aria-label": "The token's path", tabindex: "0"});
    this.got = el("section", {class: "panel got-panel", "aria-label": "Tokens of the expert", tabindex: "0"});
    this.status = el("p", {role: "status", class: "visually-hidden"});
    this.element = el("div", {class: "token-view"},
      el("div", {class: "tools"}, this.header.pages.length > 1 && button("‹ Back", () => this.turnTo(this.index - 1)),
        this.header.pages.length > 1 && button("Next ›", () => this.turnTo(this.index + 1)),
        this.header.pages.length > 1 && this.pageSlider.field),
      el("div", {class: "tools"}, this.layerSlider.field, this.slotSlider.field),
      this.legendHead, this.legend, this.keys,
      el("p", {id: "tokens-help", class: "soft"}, "Point at a token for its path through the layers; arrow keys move "
        + "from token to token. Click an expert for the tokens that it got."),
      el("div", {class: "token-columns"}, this.text, el("div", {class: "token-aside"}, this.path, this.got)), this.status);
    this.drawLegend();
    this.ready = this.turnTo(this.index);
  }

  slider(label, size, value, onmove) {
    const id = freshId("slider");
    const input = el("input", {type: "range", id, min: 0, max: size - 1, step: 1, value, disabled: size < 2,
      oninput: () => onmove(Number(input.value))});
    const output = el("output", {for: id});
    const say = (i, words) => {
      input.value = i;
      output.textContent = words;
      input.setAttribute("aria-valuetext", words);
    };
    return {field: el("span", {class: "field grow"}, el("label", {for: id}, label), input, output), say};
  }

  // -- pages ----------------------------------------------------------------------------------------------

  async turnTo(index) {
    if (!this.header.pages.length) {
      this.text.replaceChildren(el("p", {class: "soft"}, "No token was recorded."));
      return;
    }
    this.index = Math.max(0, Math.min(this.header.pages.length - 1, index));
    this.pageSlider.say(this.index, `${this.index + 1} of ${count(this.header.pages.length)}`);
    this.layerSlider.say(this.layer, this.header.layers[this.layer]);
    this.slotSlider.say(this.slot, this.slotWords());
    const turn = ++this.turn;
    const page = await this.load(this.index);
    if (turn !== this.turn) return; // a later page was requested
    if (page.broken || page.error) throw new Error(page.broken || page.error);
    const unpacked = await unpack(page);
    if (turn !== this.turn) return;
    this.page = unpacked;
    this.current = undefined;
    this.drawText();
    this.tell({page: this.index || undefined});
  }

  slotWords() {
    return `${this.slot + 1} of ${this.header.top_k[this.layer]}`;
  }

  drawText() {
    const {page} = this;
    this.cells = Array.from({length: page.tokens}, (_, i) => this.cell(i));
    const texts = [];
    let at = 0;
    for (const [label, size] of page.texts) {
      const cells = this.cells.slice(at, at + size);
      texts.push(el("h3", {class: "text-label"}, label), el("p", {class: `text ${this.isText ? "" : "numbers"}`},
        ...cells.flatMap((cell) => (cell.endsLine ? [cell, el("br")] : [cell]))));
      at += size;
    }
    this.text.replaceChildren(...texts);
    this.text.scrollTop = 0;
    this.colour();
    this.showPath(undefined);
  }

  get isText() {
    return this.header.has_text;
  }

  // The text of the token, or its id or position if the text is unknown.
  word(i) {
    const {page} = this;
    if (page.flags[i] & PADDING) return "·";
    const known = page.token_ids && page.words.get(String(page.token_ids[i]));
    if (known !== undefined) return known;
    if (page.token_ids && page.token_ids[i] >= 0) return this.isText ? `⟨${page.token_ids[i]}⟩` : String(page.token_ids[i]);
    return page.position[i] < 0 ? "?" : String(page.position[i]);
  }

  cell(i) {
    const word = this.word(i);
    const cell = el("span", {class: "token"}, visible(word) || "∅");
    cell.place = i;
    cell.endsLine = this.isText && word.includes("\n");
    if (this.page.flags[i] & PADDING) cell.classList.add("padding");
    return cell;
  }

  // -- colours --------------------------------------------------------------------------------------------

  idsAt(i, layer) {
    const {slots} = this;
    const first = (i * this.header.layers.length + layer) * slots;
    return Array.from(this.page.expert_ids.subarray(first, first + this.header.top_k[layer]));
  }

  isLost(i, layer) {
    return Boolean(this.page.lost?.[i * this.header.layers.length + layer]);
  }

  colour() {
    const {layer, slot, expert, header, page} = this;
    const L = header.layers.length;
    let [skipped, padding, lost] = [0, 0, 0];
    this.cells.forEach((cell, i) => {
      const first = (i * L + layer) * this.slots;
      const id = page.expert_ids[first + Math.min(slot, header.top_k[layer] - 1)];
      const isNone = id === header.no_expert;
      cell.classList.toggle("none", isNone);
      if (!isNone) paint(cell, id);
      const got = expert !== undefined && this.idsAt(i, layer).includes(expert);
      cell.classList.toggle("dim", expert !== undefined && !got);
      cell.classList.toggle("other-slot", got && id !== expert);
      if (page.flags[i] & PADDING) padding += 1;
      else if (this.isLost(i, layer)) lost += 1;
      else if (isNone) skipped += 1;
    });
    this.element.style.setProperty("--chosen", hue(expert ?? 0));
    this.sayKeys(padding, skipped, lost);
    this.showPath(this.shown);
    this.showGot();
  }

  sayKeys(padding, skipped, lost) {
    const key = (kind, words) => el("span", {class: "key"}, el("span", {class: `token ${kind}`}, "a"), words);
    clear(this.keys).append(`On this page: ${plural(this.page.tokens, "token")}`,
      ...(padding ? [key("padding", `padding (${count(padding)})`)] : []),
      ...(skipped ? [key("none", `no expert in this slot (${count(skipped)})`)] : []),
      ...(lost ? [key("none", `the layer's call was lost (${count(lost)})`)] : []),
      ...(this.expert === undefined ? [] : [key("other-slot", `expert ${this.expert} in another slot`)]));
  }

  chooseLayer(layer) {
    this.layer = layer;
    if (!(this.expert < this.header.num_experts[layer])) this.expert = undefined;
    this.slot = Math.min(this.slot, this.header.top_k[layer] - 1);
    this.layerSlider.say(layer, this.header.layers[layer]);
    this.slotSlider.say(this.slot, this.slotWords());
    this.drawLegend();
    this.colour();
    this.tell({site: this.header.layers[layer], expert: this.expert});
  }

  chooseSlot(slot) {
    this.slot = Math.min(slot, this.header.top_k[this.layer] - 1);
    this.slotSlider.say(this.slot, this.slotWords());
    this.colour();
    this.tell({slot: this.slot || undefined});
  }

  chooseExpert(expert) {
    this.expert = this.expert === expert ? undefined : expert;
    for (const chip of this.legend.children) chip.setAttribute("aria-pressed", String(chip.expert === this.expert));
    this.colour();
    this.tell({expert: this.expert});
  }

  // -- experts --------------------------------------------------------------------------------------------

  drawLegend() {
    const {layer, header} = this;
    const loads = header.assignments[layer];
    const total = loads.reduce((sum, load) => sum + load, 0);
    const unused = loads.filter((load) => !load).length;
    this.legendHead.textContent = `${header.layers[layer]} (${visible(header.paths[layer])}): ${header.num_experts[layer]} experts, `
      + `${header.top_k[layer]} a token, ${count(total)} assignments in the whole file`
      + `${unused ? `; ${plural(unused, "expert")} got none` : ""}.`;
    this.legend.replaceChildren(...loads.map((load, expert) => {
      const share = `expert ${expert}: ${plural(load, "assignment")}, ${percent(load, total)}`;
      const chip = button(String(expert), () => this.chooseExpert(expert), {class: `expert-chip${load ? "" : " unused"}`,
        title: share, "aria-label": share, "aria-pressed": String(expert === this.expert)});
      chip.expert = expert;
      paint(chip, expert);
      return chip;
    }));
  }

  // Tokens of this page that were routed to the selected expert, in any slot.
  showGot() {
    const {expert, layer, header} = this;
    clear(this.got).hidden = expert === undefined;
    if (expert === undefined) return;
    const loads = header.assignments[layer];
    const total = loads.reduce((sum, load) => sum + load, 0);
    const read = this.cells.flatMap((cell, i) => (this.page.flags[i] & PADDING ? [] : [i]));
    const places = read.filter((i) => this.idsAt(i, layer).includes(expert));
    const even = header.top_k[layer] / header.num_experts[layer];
    this.got.append(el("h3", {}, this.chip(expert), ` Expert ${expert} of ${header.layers[layer]}`),
      el("p", {}, `Whole file: ${plural(loads[expert], "assignment")}, ${percent(loads[expert], total)} of the layer's `
        + `(an equal share is ${percent(1, loads.length)}).`),
      el("p", {}, `This page: ${count(places.length)} of ${plural(read.length, "token")}, `
        + `${percent(places.length, read.length)} (even: ${percent(even, 1)}).`));
    if (!places.length) return;
    if (this.page.token_ids) this.got.append(...this.frequent(places));
    this.got.append(el("h4", {}, "Where"), el("ul", {class: "got-list"},
      ...places.slice(0, LISTED_MAX).map((i) => el("li", {}, this.mention(i)))));
    if (places.length > LISTED_MAX) {
      this.got.append(el("p", {class: "soft"}, `… and ${count(places.length - LISTED_MAX)} more, coloured in the text.`));
    }
  }

  frequent(places) {
    const times = new Map();
    for (const i of places) times.set(this.word(i), (times.get(this.word(i)) ?? 0) + 1);
    const most = [...times].sort((a, b) => b[1] - a[1]).slice(0, FREQUENT_MAX);
    return [el("h4", {}, "Most frequent"), el("p", {class: "frequent"},
      ...most.map(([word, number]) => el("span", {}, el("span", {class: "token plain"}, visible(word)), `×${number}`)))];
  }

  // The token between its neighbours; a click selects it.
  mention(i) {
    const words = (from, to) => {
      const found = [];
      for (let j = Math.max(0, from); j < Math.min(this.cells.length, to); j += 1) found.push(visible(this.word(j)));
      return found.join(this.isText ? "" : " ");
    };
    const cell = el("span", {class: "token"}, visible(this.word(i)));
    paint(cell, this.expert);
    return button("", () => this.go(i), {class: "mention"}).appendChild(
      el("span", {}, words(i - CONTEXT, i), this.isText ? "" : " ", cell, this.isText ? "" : " ",
        words(i + 1, i + 1 + CONTEXT))).parentElement;
  }

  chip(expert) {
    const chip = el("span", {class: "token chip"}, String(expert));
    paint(chip, expert);
    return chip;
  }

  // -- one token ------------------------------------------------------------------------------------------

  point(target) {
    if (target.place !== undefined) this.showPath(target.place);
  }

  choose(target) {
    if (target.place !== undefined) this.go(target.place);
  }

  go(i) {
    this.cells[this.current]?.classList.remove("current");
    this.current = i;
    this.cells[i].classList.add("current");
    this.cells[i].scrollIntoView({block: "nearest"});
    this.showPath(i);
    this.status.textContent = `${this.nameOf(i)}: ${this.header.layers[this.layer]} experts ${
      this.idsAt(i, this.layer).join(", ")}`;
  }

  key(event) {
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10};
    if (event.key in steps && this.cells?.length) {
      event.preventDefault();
      const next = this.current === undefined ? 0 : this.current + steps[event.key];
      this.go(Math.max(0, Math.min(this.cells.length - 1, next)));
    }
  }

  nameOf(i) {
    const {position} = this.page;
    return position[i] < 0 ? `Token ${i + 1} of the page` : `Position ${position[i]}`;
  }

  facts(i) {
    const {page, header} = this;
    const found = [`step ${page.step[i]}`, header.stages[page.stage_codes[i]]];
    if (page.token_ids && page.token_ids[i] >= 0) found.push(`token id ${page.token_ids[i]}`);
    if (page.flags[i] & PADDING) found.push("padding");
    if (page.flags[i] & RECOMPUTED) found.push("recomputed in the backward");
    if (page.position[i] < 0 && !(page.flags[i] & PADDING)) found.push("position unknown");
    return found.join(", ");
  }

  showPath(i) {
    this.shown = i;
    clear(this.path).append(el("h3", {}, i === undefined ? "A token's path" : this.nameOf(i)));
    if (i === undefined) {
      this.path.append(el("p", {class: "soft"}, "Point at a token, or choose one with a click."));
      return;
    }
    const word = this.isText ? [el("p", {}, el("span", {class: "token plain"}, visible(this.word(i)) || "∅"))] : [];
    const rows = this.header.layers.map((label, layer) => el("tr", {class: layer === this.layer ? "here" : undefined},
      el("th", {scope: "row"}, label), ...this.experts(i, layer)));
    this.path.append(...word, el("p", {class: "soft"}, this.facts(i)), el("table", {},
      el("caption", {class: "visually-hidden"}, "Experts by layer and slot"), el("tbody", {}, ...rows)));
  }

  experts(i, layer) {
    if (this.isLost(i, layer)) return [el("td", {class: "soft", colspan: this.slots}, "the call was lost")];
    const first = (i * this.header.layers.length + layer) * this.slots;
    return this.idsAt(i, layer).map((id, slot) => {
      if (id === this.header.no_expert) return el("td", {class: "soft"}, "skipped");
      const weight = this.page.weights && half(this.page.weights[first + slot]);
      const known = weight !== undefined && !Number.isNaN(weight);
      return el("td", {class: layer === this.layer && slot === this.slot ? "here" : undefined}, this.chip(id),
        known && el("span", {class: "weight"}, weight.toPrecision(2)));
    });
  }
}

export function tokens(header, load, options) {
  return new Tokens(header, load, options);
}
