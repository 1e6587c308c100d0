// Connects the tab to the TensorBoard around it: its theme, its reload button, its address.
//
// The tab runs in an iframe of the same origin. The reload button arrives over the message channel that
// TensorBoard opens for plugins. For theme and address there is no such message, so the parent page is read
// directly. Where that is forbidden (a notebook that shows TensorBoard from another origin), the tab works
// without it: with the theme of the system, and an address that does not change.

const PLUGIN = "moe";
const PREFIX = `p.${PLUGIN}.`; // TensorBoard's prefix for parameters of a plugin
const KNOWN = ["view", "run", "trace", "stage", "from", "to", "site", "expert", "step", "clock", "start", "end", "page", "slot",
  "group", "run_b", "trace_b", "stage_b"];

function parentWindow() {
  try {
    return window.parent !== window && window.parent.document ? window.parent : null;
  } catch {
    return null;
  }
}

const host = parentWindow();

// -- reload ---------------------------------------------------------------------------------------------

export function connect({onReload}) {
  if (window.parent === window) return;
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) return;
    channel.port1.postMessage(JSON.stringify(
      {type: message.type, id: message.id, payload: null, error: null, isReply: true}));
    if (message.type === "experimental.DataReloaded") onReload();
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}

// -- theme ----------------------------------------------------------------------------------------------

export function onTheme(tell) {
  if (!host) {
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => tell(dark.matches ? "dark" : "light"));
    tell(dark.matches ? "dark" : "light");
    return;
  }
  const body = host.document.body;
  const theme = () => (body.classList.contains("dark-mode") ? "dark" : "light");
  let last = theme();
  new MutationObserver(() => {
    if (theme() !== last) tell(last = theme());
  }).observe(body, {attributes: true, attributeFilter: ["class"]});
  tell(last);
}

// -- address --------------------------------------------------------------------------------------------

function parts() {
  return (host ? host.location.hash : window.location.hash).replace(/^#/, "").split("&").filter(Boolean);
}

const nameOf = (part) => decodeURIComponent(part.split("=")[0]);

export function readState() {
  const state = {};
  for (const part of parts()) {
    const [name, value] = part.split("=");
    if (value === undefined || !decodeURIComponent(name).startsWith(PREFIX)) continue;
    const key = decodeURIComponent(name).slice(PREFIX.length);
    if (KNOWN.includes(key)) state[key] = decodeURIComponent(value);
  }
  return state;
}

// Adds an entry to the browser's history when the user goes to another place, none for a moved slider.
export function writeState(state, asStep) {
  if (!host || parts()[0] !== PLUGIN) return; // another tab is active, and its address must not change
  const others = parts().slice(1).filter((part) => !nameOf(part).startsWith(PREFIX));
  const ours = KNOWN.filter((key) => state[key] !== undefined && state[key] !== "")
    .map((key) => `${PREFIX}${key}=${encodeURIComponent(state[key])}`);
  const hash = `#${[PLUGIN, ...others, ...ours].join("&")}`;
  if (hash === host.location.hash) return;
  const address = host.location.pathname + host.location.search + hash;
  host.history[asStep ? "pushState" : "replaceState"](host.history.state, "", address);
}

export function onNavigate(tell) {
  if (!host) return;
  const told = () => { if (parts()[0] === PLUGIN) tell(readState()); };
  host.addEventListener("popstate", told);
  window.addEventListener("pagehide", () => host.removeEventListener("popstate", told));
}
