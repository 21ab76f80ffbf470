// Copying a text; where the browser has no clipboard for the page (plain HTTP elsewhere), a box to copy it from.

import { announce, button, el } from "./elements.js";

export async function copy(text, what, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    box(text, what);
    return;
  }
  announce(`${what} copied`);
  const before = pressed.textContent;
  pressed.textContent = "Copied";
  setTimeout(() => {
    pressed.textContent = before;
  }, 1200);
}

function box(text, what) {
  const area = el("textarea", { readonly: true, rows: 8, "aria-label": what });
  area.value = text;
  const dialog = el("dialog", { "aria-label": what }, el("h2", {}, what), area, el("div", { class: "actions" }, button("Close", () => dialog.close(), { class: "primary" })));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  area.select();
}
