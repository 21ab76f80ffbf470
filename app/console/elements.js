// Elements of the page. No module of the console parses HTML: strings always become text nodes.

/** An element. Props named `on…` are listeners; `true` sets an empty attribute, `false` none. */
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

/** Replace an element's children; null, undefined and false are left out. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** As `fill`, for children that replace similar ones: open details stay open, and the focus is kept. */
export function refresh(element, ...children) {
  const opened = new Set([...element.querySelectorAll("details[open]")].map(identityOf));
  const focused = element.contains(document.activeElement) ? identityOf(document.activeElement) : null;
  fill(element, ...children);
  for (const each of element.querySelectorAll("details")) if (opened.has(identityOf(each))) each.open = true;
  if (focused !== null) [...element.querySelectorAll("button, summary, input, [tabindex]")].find((each) => identityOf(each) === focused)?.focus({ preventScroll: true });
}

const identityOf = (element) => element.dataset.key ?? element.getAttribute("aria-label") ?? (element.tagName === "DETAILS" ? "" : element.textContent);

let ids = 0;

/** An id that is unique on the page. */
export function freshId(prefix) {
  ids += 1;
  return `${prefix}-${ids}`;
}

/** A user's text, isolated so that its direction does not affect the text around it. */
export function userText(text, props = {}) {
  return el("bdi", props, text);
}

/** A labelled control. */
export function field(label, control, after = null) {
  control.id ||= freshId("field");
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control, after);
}

/** A drop-down list of [value, text] pairs. */
export function dropDown(options, chosen, onchange, props = {}) {
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

/** A table with a caption for screen readers. Cells are texts or elements; the first of each row is its heading. */
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

let announcing = 0;

/** Have screen readers read a text, unless another one follows within 0.4 s. */
export function announce(words) {
  clearTimeout(announcing);
  announcing = setTimeout(() => {
    document.getElementById("spoken").textContent = words;
  }, 400);
}
