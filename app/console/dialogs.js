// Dialogs that confirm a change, and stay open with the reason if it is refused.

import { isAbort } from "./api.js";
import { button, el, field, freshId } from "./elements.js";
import { failed } from "./notices.js";

/**
 * Ask before `run` is done; `run` may throw, and its error is shown in the dialog, which can then be tried again.
 * `refused(error)` may give an element that goes with the error, at once or later, and change what the next attempt does.
 * `dismiss`: what the button that does nothing says.
 */
export function confirm({ title, content, action, dismiss = "Cancel", danger = false, run, refused = () => null }) {
  const id = freshId("dialog");
  const problem = el("div", {});
  const go = el("button", { type: "submit", class: danger ? "danger" : "primary" }, action);
  const form = el(
    "form",
    {
      method: "dialog",
      onsubmit: async (event) => {
        event.preventDefault();
        go.disabled = true;
        try {
          await run();
          dialog.close();
        } catch (error) {
          if (isAbort(error)) return;
          problem.replaceChildren(failed(error));
          const more = await refused(error);
          if (more) problem.append(more);
          problem.scrollIntoView({ block: "nearest" });
        } finally {
          go.disabled = false;
        }
      },
    },
    el("h2", { id }, title),
    content,
    problem,
    el("div", { class: "actions" }, button(dismiss, () => dialog.close(), { class: "plain" }), go),
  );
  const dialog = el("dialog", { "aria-labelledby": id }, form);
  const opener = document.activeElement;
  dialog.addEventListener("close", () => {
    dialog.remove();
    backTo(opener);
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** A field for the reason of a change, which the audit keeps. */
export function reasonField(value = "") {
  const input = el("input", { type: "text", maxlength: 500, autocomplete: "off", name: "reason" });
  input.value = value;
  return { element: field("Reason, for the audit", input), value: () => input.value.trim() || null };
}

/** Give the focus back to where it was; what was there may have been drawn anew, or be gone. */
function backTo(opener) {
  if (opener?.isConnected && !opener.hidden) return; // the browser does it
  const name = opener?.getAttribute("aria-label");
  const same = name ? document.querySelector(`main [aria-label="${CSS.escape(name)}"]:not([hidden])`) : null;
  (same ?? document.getElementById("main")).focus({ preventScroll: true });
}
