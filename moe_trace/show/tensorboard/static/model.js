// Requests data from the plugin's routes, independently of the page.

const CACHE_MAX = 64;
const kept = new Map();

export function address(view, parameters) {
  const known = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== "");
  const query = new URLSearchParams(known.map(([name, value]) => [name, String(value)])).toString();
  return query ? `${view}?${query}` : view;
}

// Returns the response to a request; throws an Error whose message can be shown.
export async function ask(view, parameters = {}) {
  let answer;
  try {
    answer = await fetch(address(view, parameters), {headers: {Accept: "application/json"}});
  } catch {
    throw new Error("TensorBoard does not answer. Is it still running? Start it again, then try again.");
  }
  const isJson = (answer.headers.get("Content-Type") || "").startsWith("application/json");
  const content = isJson ? await answer.json() : {error: `TensorBoard answered with status ${answer.status}`};
  if (!answer.ok) throw new Error(content.error || `TensorBoard answered with status ${answer.status}`);
  return content;
}

// The same with a cache of the last responses, for the repeated requests of a slider.
export function askOnce(view, parameters) {
  const key = address(view, parameters);
  if (!kept.has(key)) {
    const answer = ask(view, parameters);
    answer.catch(() => kept.delete(key));
    kept.set(key, answer);
    if (kept.size > CACHE_MAX) kept.delete(kept.keys().next().value);
  }
  return kept.get(key);
}

// Clears the cache: after a reload the files may have changed.
export function forget() {
  kept.clear();
}

// Passes on only the response to the latest request, so that an older one never overwrites it.
export class Latest {
  #turn = 0;

  async ask(question) {
    const turn = ++this.#turn;
    const answer = await question;
    return turn === this.#turn ? answer : undefined;
  }
}
