// Follows changes on the server: by the stream /v1/events, read with fetch because EventSource sends no key, or by polling.

import { ConnectionLost, call, connected, headers, isAbort, reportLost, problemOf, keyPrompt, withQuery } from "./api.js";
import { askForKey, key } from "./api-key.js";
import { Observable } from "./observable.js";

/** The newest reply of GET /v1/erasures; null until there is one. */
export const live = new Observable(null);
/** How changes are followed: "stream", "poll", "refused" (not with this key), or "" while they are not. */
export const updateMode = new Observable("");
/** A number that increases when the list of range sets may have changed. */
export const rangeSetsChanged = new Observable(0);
/** The job of the latest event about jobs; null until there is one. */
export const latestJob = new Observable(null);

const POLL_EVERY = 900; // milliseconds, so that pages follow within a second without a stream too
const LISTS_EVERY = 5000; // milliseconds between reads of range sets, which change rarely
const SILENCE = 40_000; // milliseconds without a byte after which a stream is considered dead; the server sends a comment every 15 s
const STREAM_RETRY = 15_000; // milliseconds of polling before a stream that was refused is tried again
const PAUSE = 1000; // milliseconds before the next attempt

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Set the live state from a reply, unless a newer one is known. */
export function updateLive(listing) {
  if (!live.value || newer(listing.generation, live.value.generation)) live.value = listing;
}

/** After status 412: read the live state and set the generation of `guard` for the next attempt. Returns null if that fails. */
export async function reloadLive(guard, error) {
  guard.generation = error.generation;
  try {
    const { data } = await call("GET", "/v1/erasures");
    updateLive(data);
    guard.generation = data.generation;
    return data;
  } catch {
    return null; // the page updates when the server answers again
  }
}

function newer(generation, than) {
  const [epoch, counter] = generation.split("-");
  const [thanEpoch, thanCounter] = than.split("-");
  return epoch !== thanEpoch || Number(counter) > Number(thanCounter);
}

/** Follow changes while the page is open: by a stream, or by polling while there is none. */
export async function followUpdates() {
  let streamAt = 0; // when to try a stream again; Infinity if the server has none
  let listsAt = 0; // when to read lists again
  for (;;) {
    try {
      if (performance.now() >= streamAt) {
        await readStream();
      } else {
        await poll();
        if (performance.now() >= listsAt) {
          listsAt = performance.now() + LISTS_EVERY;
          rangeSetsChanged.value += 1;
        }
        await sleep(POLL_EVERY);
      }
    } catch (error) {
      updateMode.value = error.status === 403 ? "refused" : "";
      if (error.status === 404 || error.status === 405) streamAt = Infinity;
      else if (error.status === 401 || error.status === 403) await newKey(error);
      else if (error instanceof ConnectionLost) await reconnected();
      else {
        if (performance.now() >= streamAt) streamAt = performance.now() + STREAM_RETRY; // the server has no stream left
        else await sleep(error.retryAfter ? 1000 * error.retryAfter : PAUSE);
      }
    }
  }
}

async function poll() {
  const { data } = await call("GET", "/v1/erasures");
  updateMode.value = "poll";
  updateOrExpire(data);
}

/** As `updateLive`, and an erasure that has expired, which disappears before there is a new generation, is removed. */
function updateOrExpire(listing) {
  const known = live.value;
  if (known && known.generation === listing.generation && known.erasures.length !== listing.erasures.length) live.value = listing;
  else updateLive(listing);
}

async function readStream() {
  const aborting = new AbortController();
  let silence = 0;
  const onData = () => {
    clearTimeout(silence);
    silence = setTimeout(() => aborting.abort(), SILENCE);
  };
  const usedKey = key.value;
  const changed = new AbortController();
  const began = performance.now();
  key.subscribe(() => aborting.abort(), changed.signal);
  try {
    onData();
    const response = await fetch(withQuery("/v1/events"), { headers: headers({ Accept: "text/event-stream" }), signal: aborting.signal, cache: "no-store" });
    if (!response.ok) throw await problemOf(response);
    updateMode.value = "stream";
    connected.value ||= true;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      onData();
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      events.forEach(handle);
    }
  } catch (error) {
    if (error.status) throw error;
    if (isAbort(error)) return usedKey === key.value ? sleep(PAUSE) : undefined;
    reportLost();
    throw new ConnectionLost();
  } finally {
    clearTimeout(silence);
    changed.abort();
  }
  updateMode.value = "";
  if (performance.now() - began < PAUSE) await sleep(PAUSE); // the server is draining, and another one may answer
}

function handle(event) {
  let name = "";
  const lines = [];
  for (const line of event.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
  }
  if (!lines.length) return;
  const data = JSON.parse(lines.join("\n"));
  if (name === "live") updateOrExpire(data);
  if (name === "range_sets") rangeSetsChanged.value += 1;
  if (name === "jobs") latestJob.value = data;
}

function newKey(error) {
  if (error.status === 401) askForKey(keyPrompt(error));
  return nextValue(key);
}

const reconnected = () => (connected.value ? undefined : nextValue(connected));

function nextValue(observable) {
  return new Promise((resolve) => {
    const received = new AbortController();
    observable.subscribe(() => {
      received.abort();
      resolve();
    }, received.signal);
  });
}
