// What the address bar says: #/view?name=value. The part behind # never leaves the browser, and a link shares it.

/** The view and its parameters. */
export function read() {
  const [view, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s, 2);
  return { view, params: new URLSearchParams(query) };
}

/** The address of a view; parameters that are empty are left out. */
export function address(view, params = {}) {
  const query = new URLSearchParams();
  for (const [name, values] of Object.entries(params)) {
    for (const value of Array.isArray(values) ? values : [values]) {
      if (value !== "" && value !== null && value !== undefined) query.append(name, value);
    }
  }
  const text = query.toString();
  return `#/${view}${text ? `?${text}` : ""}`;
}

const REST = 250; // milliseconds: browsers refuse an address that changes a hundred times in a few seconds

let waiting = null;
let settled = -Infinity;

/** Put a view's parameters into its link, and at once, or in a moment, into the address bar, without a new entry in the history. */
export function keep(view, params) {
  const here = address(view, params);
  for (const link of document.querySelectorAll(`nav a[data-view="${view}"]`)) link.href = here;
  if (waiting) clearTimeout(waiting.timer);
  waiting = { view, here, timer: setTimeout(settle, Math.max(0, settled + REST - performance.now())) };
}

/** Have the address bar say what is shown, now. */
export function settle() {
  if (!waiting) return;
  const { view, here, timer } = waiting;
  clearTimeout(timer);
  waiting = null;
  settled = performance.now();
  if (read().view === view && location.hash !== here) history.replaceState(null, "", here);
}

addEventListener("pagehide", settle);
