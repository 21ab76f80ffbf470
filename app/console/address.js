// The address of a view: #/view?name=value. The part after # is not sent to the server.

/** The view and its parameters. */
export function readAddress() {
  const [view, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s, 2);
  return { view, params: new URLSearchParams(query) };
}

/** The address of a view, without empty parameters. */
export function addressOf(view, params = {}) {
  const query = new URLSearchParams();
  for (const [name, values] of Object.entries(params)) {
    for (const value of Array.isArray(values) ? values : [values]) {
      if (value !== "" && value !== null && value !== undefined) query.append(name, value);
    }
  }
  const text = query.toString();
  return `#/${view}${text ? `?${text}` : ""}`;
}

const INTERVAL = 250; // milliseconds between changes: browsers limit how often an address may change

let pending = null;
let changedAt = -Infinity;

/** Put a view's parameters into its link and, soon, into the address bar, without a new entry in the history. */
export function setAddress(view, params) {
  const here = addressOf(view, params);
  for (const link of document.querySelectorAll(`nav a[data-view="${view}"]`)) link.href = here;
  if (pending) clearTimeout(pending.timer);
  pending = { view, here, timer: setTimeout(flushAddress, Math.max(0, changedAt + INTERVAL - performance.now())) };
}

/** Update the address bar now. */
export function flushAddress() {
  if (!pending) return;
  const { view, here, timer } = pending;
  clearTimeout(timer);
  pending = null;
  changedAt = performance.now();
  if (readAddress().view === view && location.hash !== here) history.replaceState(null, "", here);
}

addEventListener("pagehide", flushAddress);
