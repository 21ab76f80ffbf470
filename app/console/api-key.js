// The API key: stored for this tab only (sessionStorage), never in the address; asked for when the server requires one.

import { el, field, button } from "./elements.js";
import { Observable } from "./observable.js";

const STORAGE_KEY = "neuronlens-key";
const VALID = /^[\x21-\x7e]{1,500}$/; // what a header can hold

/** The key of this tab; "" for none. */
export const key = new Observable(stored());

function stored() {
  try {
    return sessionStorage.getItem(STORAGE_KEY) ?? "";
  } catch {
    return "";
  }
}

function store(value) {
  try {
    if (value) sessionStorage.setItem(STORAGE_KEY, value);
    else sessionStorage.removeItem(STORAGE_KEY);
  } catch {
    // storage is disabled: the key lasts until the page is left
  }
  key.value = value;
}

let dialogResult = null;
let declined = false;

/** Ask for a key, in one dialog for all calls that need one; resolves to whether a key was entered. */
export function askForKey(why, { insist = false } = {}) {
  if (declined && !insist) return Promise.resolve(false);
  dialogResult ??= ask(why).finally(() => {
    dialogResult = null;
  });
  return dialogResult;
}

function ask(why) {
  return new Promise((resolve) => {
    let entered = false;
    const input = el("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true, name: "key" });
    const wrong = el("p", { class: "problem-text", role: "alert", hidden: true }, "Invalid key: expected one word, as it was printed when the key was created (nl_…).");
    const form = el(
      "form",
      {
        method: "dialog",
        onsubmit: (event) => {
          event.preventDefault();
          const value = input.value.trim();
          wrong.hidden = VALID.test(value);
          if (!VALID.test(value)) return;
          entered = true;
          declined = false;
          store(value);
          dialog.close();
        },
      },
      el("h2", { id: "key-title" }, "API key"),
      el("p", {}, why),
      field("Key", input),
      wrong,
      el("p", { class: "quiet" }, "The key stays in this tab until you close it, and is sent to this server only. Create one with ", el("code", {}, "neuronlens keys create NAME --scope infer,read"), "."),
      el(
        "div",
        { class: "actions" },
        key.value ? button("Forget the key", () => {
          store("");
          dialog.close();
        }, { class: "plain" }) : null,
        button("Not now", () => dialog.close(), { class: "plain" }),
        el("button", { type: "submit", class: "primary" }, "Use this key"),
      ),
    );
    const dialog = el("dialog", { "aria-labelledby": "key-title" }, form);
    dialog.addEventListener("close", () => {
      declined = !entered;
      dialog.remove();
      resolve(entered);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
