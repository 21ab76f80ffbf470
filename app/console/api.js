// Calls of the /v1 API.

import { askForKey, key } from "./api-key.js";
import { modelQuery } from "./model.js";
import { Observable } from "./observable.js";

/** An error that the server returned (application/problem+json). */
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body.detail ?? `the server answered ${status}`);
    this.status = status;
    this.code = body.code ?? "";
    this.requestId = body.request_id ?? "";
    this.generation = body.generation ?? null;
    this.known = body.known ?? [];
    this.retryAfter = retryAfter; // seconds; null where the server did not say
  }
}

/** No answer: the server cannot be reached. */
export class ConnectionLost extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

/** Whether the server answered last. */
export const connected = new Observable(true);

export const isAbort = (error) => error.name === "AbortError";

const RECONNECT_EVERY = 1500; // milliseconds

/** Headers of a call, with this tab's key. */
export function headers(more = {}) {
  return key.value ? { Authorization: `Bearer ${key.value}`, ...more } : more;
}

/** A path of quoted parts. */
export const path = (...parts) => `/${parts.map(encodeURIComponent).join("/")}`;

/** A concept as a path segment and query parameters: browsers resolve "." and ".." in a path even if they are quoted. */
export const conceptPath = (concept) => (concept === "." || concept === ".." ? { at: "-", named: { name: concept } } : { at: concept, named: {} });

/** An address of the API with a query that names the page's model. */
export function withQuery(address, query = {}) {
  const present = Object.entries({ ...modelQuery, ...query }).filter(([, value]) => value !== null && value !== undefined);
  return present.length ? `${address}?${new URLSearchParams(present)}` : address;
}

/**
 * Call the API; returns { data, etag }. `text`: do not parse the body.
 * Asks for a key once if the server requires one. Throws Problem, ConnectionLost, or AbortError by `signal`.
 */
export async function call(method, route, { body, query, ifMatch, signal, text = false } = {}) {
  const address = withQuery(route, query);
  for (let prompted = false; ; prompted = true) {
    const used = key.value;
    const response = await send(address, {
      method,
      signal,
      headers: headers({
        ...(body === undefined ? {} : { "Content-Type": "application/json" }),
        ...(ifMatch ? { "If-Match": `"${ifMatch}"` } : {}),
      }),
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
    });
    if (response.ok) {
      const etag = (response.headers.get("ETag") ?? "").replaceAll('"', "");
      return { data: await readBody(response, text), etag };
    }
    const problem = await problemOf(response);
    const again = response.status === 401 && !prompted && (key.value !== used || (await askForKey(keyPrompt(problem))));
    if (!again) throw problem;
  }
}

async function send(address, options) {
  try {
    const response = await fetch(address, options);
    if (!connected.value) connected.value = true;
    return response;
  } catch (error) {
    throw connectionError(error);
  }
}

async function readBody(response, text) {
  let body;
  try {
    body = await response.text();
  } catch (error) {
    throw connectionError(error); // the connection broke
  }
  return text ? body : JSON.parse(body);
}

/** The error to throw after a failed fetch: the call was aborted, or the server cannot be reached. */
function connectionError(error) {
  if (isAbort(error)) return error;
  reportLost();
  return new ConnectionLost();
}

/** The error in a response. */
export async function problemOf(response) {
  const wait = Number(response.headers.get("Retry-After"));
  let body = {};
  try {
    body = await response.json();
  } catch {
    // a proxy answered
  }
  return new Problem(response.status, body, Number.isFinite(wait) && wait > 0 ? wait : null);
}

/** Why a key is needed, for the dialog. */
export function keyPrompt(problem) {
  return problem.code === "bad_key" ? "The server rejected this key: it is wrong, revoked or expired." : "This server requires an API key.";
}

/** Record that the server cannot be reached, and try until it answers again. */
export function reportLost() {
  if (!connected.value) return;
  connected.value = false;
  const reconnect = async () => {
    try {
      await fetch("/livez", { cache: "no-store" });
      connected.value = true;
    } catch {
      setTimeout(reconnect, RECONNECT_EVERY);
    }
  };
  setTimeout(reconnect, RECONNECT_EVERY);
}
