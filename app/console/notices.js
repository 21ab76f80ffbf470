// What is shown where there is nothing to show yet: loading, nothing, a problem, a server that is away.

import { Lost } from "./api.js";
import { askForKey } from "./key.js";
import { button, el } from "./elements.js";

export const loading = (what) => el("p", { class: "loading", role: "status" }, `Loading ${what}…`);

export const empty = (title, ...words) => el("div", { class: "empty" }, el("p", { class: "empty-title" }, title), words.length ? el("p", { class: "quiet" }, ...words) : null);

/** An error as a card: what happened, what can be done, and the request's id for whoever reads the log. */
export function failed(error, again) {
  console.debug(error);
  const [title, help] = meaning(error);
  return el(
    "div",
    { class: "problem", role: "alert" },
    el("p", { class: "problem-title" }, title),
    el("p", {}, error instanceof Lost ? help : error.message),
    error instanceof Lost || !help ? null : el("p", { class: "quiet" }, help),
    error.requestId ? el("p", { class: "quiet" }, "Request ", el("code", {}, error.requestId)) : null,
    el(
      "div",
      { class: "actions start" },
      again ? button("Try again", again) : null,
      error.status === 401 || error.status === 403 ? button("Use another key", async () => {
        if (await askForKey("Another key may be allowed to.", { insist: true })) again?.();
      }) : null,
    ),
  );
}

function meaning(error) {
  if (error instanceof Lost) return ["No connection", "What was asked last was not answered; it is asked again as soon as the server is back."];
  switch (error.status) {
    case 401:
      return ["A key is needed", null];
    case 403:
      return ["This key may not do that", null];
    case 404:
      return ["Not found", null];
    case 409:
      return ["That does not fit what is there", null];
    case 412:
      return ["Somebody was faster", null];
    case 429:
      return ["Too much at once", error.retryAfter ? `Try again in ${error.retryAfter} s.` : null];
    case 503:
      return ["Not available just now", error.code === "no_range_set" ? "Nothing can be erased until ranges are fitted." : null];
    default:
      return [error.status ? "That did not work" : "The page met a fault of its own", null];
  }
}
