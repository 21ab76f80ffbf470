// Which of the server's models the page is about: ?model= of its own address, and of every call. "" is the first, or only, one.

import { address, read, settle } from "./state.js";

export const model = new URLSearchParams(location.search).get("model") ?? "";

/** What a query or a body says of it. */
export const named = model ? { model } : {};

/** The page of another model, at the same part and with the same text. */
export function choose(name) {
  settle();
  const { view, params } = read();
  location.assign(`${location.pathname}?${new URLSearchParams({ model: name })}${address(view, { text: params.get("text") })}`);
}
