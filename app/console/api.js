// Calls of the public /v1 API.

import { askForKey, key } from "./key.js";
import { named } from "./model.js";
import { Watched } from "./watched.js";

/** What the server answered instead of what was asked for (application/problem+json). */
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

/** No answer came: the server, or the way to it, is away. */
export class Lost extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

/** Whether the server answers, as far as is known. */
export const connected = new Watched(true);

export const isAbort = (error) => error.name === "AbortError";

const AGAIN = 1500; // milliseconds between two looks for a server that is away

/** The headers of a call by this tab's key. */
export function headers(more = {}) {
  return key.value ? { Authorization: `Bearer ${key.value}`, ...more } : more;
}

/** The path of something with a name of a user's making. */
export const path = (...parts) => `/${parts.map(encodeURIComponent).join("/")}`;

/** A concept in a path, and what goes into the query with it: browsers resolve "." and "..", however they are written. */
export const ofConcept = (concept) => (concept === "." || concept === ".." ? { at: "-", named: { name: concept } } : { at: concept, named: {} });

/** An address of the API with a query, which names the page's model. */
export function asked(where, query = {}) {
  const known = Object.entries({ ...named, ...query }).filter(([, value]) => value !== null && value !== undefined);
  return known.length ? `${where}?${new URLSearchParams(known)}` : where;
}

/**
 * Call the API and give { data, etag, text }.
 * Asks for a key once if the server wants one. Throws Problem, Lost, or AbortError by `signal`.
 */
export async function call(method, where, { body, query, ifMatch, signal, text = false } = {}) {
  const address = asked(where, query);
  for (let asked = false; ; asked = true) {
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
      return { data: await bodyOf(response, text), etag };
    }
    const problem = await problemOf(response);
    const again = response.status === 401 && !asked && (key.value !== used || (await askForKey(reasonFor(problem))));
    if (!again) throw problem;
  }
}

async function send(address, options) {
  try {
    const response = await fetch(address, options);
    if (!connected.value) connected.value = true;
    return response;
  } catch (error) {
    throw lostOr(error);
  }
}

async function bodyOf(response, text) {
  let said;
  try {
    said = await response.text();
  } catch (error) {
    throw lostOr(error); // half-way
  }
  return text ? said : JSON.parse(said);
}

/** What to throw where a call failed: it was aborted, or the server is away. */
function lostOr(error) {
  if (isAbort(error)) return error;
  lost();
  return new Lost();
}

/** The problem that a refused call was answered with. */
export async function problemOf(response) {
  const wait = Number(response.headers.get("Retry-After"));
  let body = {};
  try {
    body = await response.json();
  } catch {
    // something between here and the server answered
  }
  return new Problem(response.status, body, Number.isFinite(wait) && wait > 0 ? wait : null);
}

/** Why a key is asked for, in the words of the dialog. */
export function reasonFor(problem) {
  return problem.code === "bad_key" ? "The server does not know this key: it is wrong, was revoked, or has expired." : "This server asks for an API key.";
}

/** Note that the server is away, and look for it until it is back. */
export function lost() {
  if (!connected.value) return;
  connected.value = false;
  const look = async () => {
    try {
      await fetch("/livez", { cache: "no-store" });
      connected.value = true;
    } catch {
      setTimeout(look, AGAIN);
    }
  };
  setTimeout(look, AGAIN);
}
