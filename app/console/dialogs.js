// Dialogs that confirm a change. They stay open and show the error if it fails.

import { isAbort } from "./api.js";
import { button, el, field, freshId } from "./elements.js";
import { errorCard } from "./notices.js";

/**
 * Ask before `run`. If it throws, the dialog shows the error and `run` can be tried again.
 * `refused(error)` may return an element to show below the error, or a promise of one, and prepare the next attempt.
 * `dismiss`: the text of the button that closes the dialog.
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
          problem.replaceChildren(errorCard(error));
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
    returnFocus(opener);
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** A field for the reason of a change, which is recorded in the audit log. */
export function reasonField(value = "") {
  const input = el("input", { type: "text", maxlength: 500, autocomplete: "off", name: "reason" });
  input.value = value;
  return { element: field("Reason, for the audit log", input), value: () => input.value.trim() || null };
}

/** Return the focus to the element that opened the dialog, or to its replacement if it was redrawn. */
function returnFocus(opener) {
  if (opener?.isConnected && !opener.hidden) return; // the browser does it
  const name = opener?.getAttribute("aria-label");
  const same = name ? document.querySelector(`main [aria-label="${CSS.escape(name)}"]:not([hidden])`) : null;
  (same ?? document.getElementById("main")).focus({ preventScroll: true });
}
