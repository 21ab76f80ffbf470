// Copies a text. If the page may not use the clipboard (plain HTTP from another host), a dialog shows the text instead.

import { announce, button, el } from "./elements.js";

export async function copy(text, what, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    showText(text, what);
    return;
  }
  announce(`${what} copied`);
  const before = pressed.textContent;
  pressed.textContent = "Copied";
  setTimeout(() => {
    pressed.textContent = before;
  }, 1200);
}

function showText(text, what) {
  const area = el("textarea", { readonly: true, rows: 8, "aria-label": what });
  area.value = text;
  const dialog = el("dialog", { "aria-label": what }, el("h2", {}, what), area, el("div", { class: "actions" }, button("Close", () => dialog.close(), { class: "primary" })));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  area.select();
}
