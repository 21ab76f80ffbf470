// Elements of the page. Text only ever enters as text: nothing here, or anywhere in the console, parses HTML.

/** An element; `on…` props are listeners, `true`/`false` set or leave out an attribute, strings become text nodes. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  return fill(element, ...children);
}

/** Give an element other children; null, undefined and false are left out. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** As `fill`, where the new children stand for the old: what was open stays open, and what has the focus keeps it. */
export function refill(element, ...children) {
  const opened = new Set([...element.querySelectorAll("details[open]")].map(standsFor));
  const focused = element.contains(document.activeElement) ? standsFor(document.activeElement) : null;
  fill(element, ...children);
  for (const each of element.querySelectorAll("details")) if (opened.has(standsFor(each))) each.open = true;
  if (focused !== null) [...element.querySelectorAll("button, summary, input, [tabindex]")].find((each) => standsFor(each) === focused)?.focus({ preventScroll: true });
}

const standsFor = (element) => element.dataset.key ?? element.getAttribute("aria-label") ?? (element.tagName === "DETAILS" ? "" : element.textContent);

let ids = 0;

/** An id that nothing else on the page has. */
export function freshId(prefix) {
  ids += 1;
  return `${prefix}-${ids}`;
}

/** A text of a user, in its own direction: it cannot turn the words beside it around. */
export function quoted(text, props = {}) {
  return el("bdi", props, text);
}

/** A labelled control. */
export function field(label, control, after = null) {
  control.id ||= freshId("field");
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, after);
}

/** A drop-down list of [value, text] pairs. */
export function choice(options, chosen, onchange, props = {}) {
  const select = el(
    "select",
    { ...props, onchange: () => onchange(select.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)),
  );
  return select;
}

/** A button. */
export function button(text, onclick, props = {}) {
  return el("button", { type: "button", onclick, ...props }, text);
}

/** A table with a caption for screen readers; cells are texts or elements, the first of a row is its heading. */
export function table(caption, columns, rows, props = {}) {
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el(
      "table",
      props,
      el("caption", { class: "unseen" }, caption),
      el("thead", {}, el("tr", {}, columns.map((column) => el("th", { scope: "col" }, column)))),
      el(
        "tbody",
        {},
        rows.map((cells) => el("tr", {}, cells.map((cell, at) => (at ? el("td", {}, cell) : el("th", { scope: "row" }, cell))))),
      ),
    ),
  );
}

let speaking = 0;

/** Have a screen reader say something, once the words have settled. */
export function announce(words) {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    document.getElementById("spoken").textContent = words;
  }, 400);
}
