// Notices: loading, nothing to show, errors.

import { ConnectionLost } from "./api.js";
import { askForKey } from "./api-key.js";
import { button, el } from "./elements.js";

export const loading = (what) => el("p", { class: "loading", role: "status" }, `Loading ${what}…`);

export const empty = (title, ...words) => el("div", { class: "empty" }, el("p", { class: "empty-title" }, title), words.length ? el("p", { class: "quiet" }, ...words) : null);

/** A card about an error: what happened, what to do, and the id of the request in the server's log. */
export function errorCard(error, again) {
  console.debug(error);
  const [title, help] = titleAndHint(error);
  return el(
    "div",
    { class: "problem", role: "alert" },
    el("p", { class: "problem-title" }, title),
    el("p", {}, error instanceof ConnectionLost ? help : error.message),
    error instanceof ConnectionLost || !help ? null : el("p", { class: "quiet" }, help),
    error.requestId ? el("p", { class: "quiet" }, "Request ", el("code", {}, error.requestId)) : null,
    el(
      "div",
      { class: "actions start" },
      again ? button("Try again", again) : null,
      error.status === 401 || error.status === 403 ? button("Use another key", async () => {
        if (await askForKey("Enter a key with the required scope.", { insist: true })) again?.();
      }) : null,
    ),
  );
}

function titleAndHint(error) {
  if (error instanceof ConnectionLost) return ["No connection", "The last request was not answered. It is repeated when the server answers again."];
  switch (error.status) {
    case 401:
      return ["API key required", null];
    case 403:
      return ["Not allowed with this key", null];
    case 404:
      return ["Not found", null];
    case 409:
      return ["Conflict", null];
    case 412:
      return ["Changed in the meantime", null];
    case 429:
      return ["Too many requests", error.retryAfter ? `Try again in ${error.retryAfter} s.` : null];
    case 503:
      return ["Not available now", error.code === "no_range_set" ? "Nothing can be erased until ranges are fitted." : null];
    default:
      return [error.status ? "Request failed" : "Error in this page", null];
  }
}
