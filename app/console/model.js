// The model that the page shows: ?model= in its address and in every call. "" is the server's default.

import { addressOf, flushAddress, readAddress } from "./address.js";

export const model = new URLSearchParams(location.search).get("model") ?? "";

/** The model's name in a query or a body. */
export const modelQuery = model ? { model } : {};

/** Open the page of another model, at the same view and with the same text. */
export function selectModel(name) {
  flushAddress();
  const { view, params } = readAddress();
  location.assign(`${location.pathname}?${new URLSearchParams({ model: name })}${addressOf(view, { text: params.get("text") })}`);
}
