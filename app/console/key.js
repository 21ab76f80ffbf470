// The API key: kept for this tab only (sessionStorage), never in the address, asked for when the server wants one.

import { el, field, button } from "./elements.js";
import { Watched } from "./watched.js";

const PLACE = "neuronlens-key";
const FORM = /^[\x21-\x7e]{1,500}$/; // else no header could carry it

/** The key that calls are made with; "" for none. */
export const key = new Watched(kept());

function kept() {
  try {
    return sessionStorage.getItem(PLACE) ?? "";
  } catch {
    return "";
  }
}

function keep(value) {
  try {
    if (value) sessionStorage.setItem(PLACE, value);
    else sessionStorage.removeItem(PLACE);
  } catch {
    // it lasts until the page is left, then
  }
  key.value = value;
}

let asking = null;
let declined = false;

/** Ask for a key, in one dialog however many calls want one: whether there is a new one. */
export function askForKey(why, { insist = false } = {}) {
  if (declined && !insist) return Promise.resolve(false);
  asking ??= ask(why).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(why) {
  return new Promise((resolve) => {
    let given = false;
    const input = el("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true, name: "key" });
    const wrong = el("p", { class: "problem-text", role: "alert", hidden: true }, "A key is one word, as it was printed when it was made: nl_…");
    const form = el(
      "form",
      {
        method: "dialog",
        onsubmit: (event) => {
          event.preventDefault();
          const value = input.value.trim();
          wrong.hidden = FORM.test(value);
          if (!FORM.test(value)) return;
          given = true;
          declined = false;
          keep(value);
          dialog.close();
        },
      },
      el("h2", { id: "key-title" }, "API key"),
      el("p", {}, why),
      field("Key", input),
      wrong,
      el("p", { class: "quiet" }, "It stays in this tab until you close it, and is sent to this server only. ", el("code", {}, "neuronlens keys create NAME --scope infer,read"), " makes one."),
      el(
        "div",
        { class: "actions" },
        key.value ? button("Forget the key", () => {
          keep("");
          dialog.close();
        }, { class: "plain" }) : null,
        button("Not now", () => dialog.close(), { class: "plain" }),
        el("button", { type: "submit", class: "primary" }, "Use it"),
      ),
    );
    const dialog = el("dialog", { "aria-labelledby": "key-title" }, form);
    dialog.addEventListener("close", () => {
      declined = !given;
      dialog.remove();
      resolve(given);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
