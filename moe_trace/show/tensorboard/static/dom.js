// Builds DOM. Text is inserted as text, never as HTML, since names come from files.

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

export function clear(element) {
  element.replaceChildren();
  return element;
}

let ids = 0;
export const freshId = (stem) => `${stem}-${++ids}`;

// Returns text with the parts between backquotes as code.
export function marked(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

export function select(label, options, value, onchange) {
  const id = freshId("select");
  const box = el("select", {id, onchange: () => onchange(box.value)},
    ...options.map(([key, text, disabled]) => el("option", {value: key, disabled}, text)));
  if (value !== undefined) box.value = value;
  return el("span", {class: "field"}, el("label", {for: id}, label), box);
}

export function button(text, onclick, properties = {}) {
  return el("button", {type: "button", onclick, ...properties}, text);
}
