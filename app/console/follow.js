// The live state as it changes: by /v1/events, read as a stream (EventSource sends no key), else by asking.

import { Lost, asked, call, connected, headers, isAbort, lost, problemOf, reasonFor } from "./api.js";
import { askForKey, key } from "./key.js";
import { Watched } from "./watched.js";

/** The listing of GET /v1/erasures, newest known; null until it is. */
export const live = new Watched(null);
/** How it is followed: "stream", "poll", "refused" by this key, or "" while it is not. */
export const following = new Watched("");
/** Counts up when the list of range sets may have changed. */
export const rangeSetsChanged = new Watched(0);
/** The job of the last event about one; null until there is one. */
export const jobs = new Watched(null);

const ASK_EVERY = 900; // milliseconds: other windows follow within a second even without a stream
const LISTS_EVERY = 5000; // milliseconds: range sets, which change seldom
const SILENCE = 40_000; // milliseconds without even a comment line, after which a stream is taken for dead
const WITHOUT = 15_000; // milliseconds of asking before a stream that was refused is tried again
const PAUSE = 1000; // milliseconds before the next attempt

const rest = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Take over a listing that some call gave. An older one than is known changes nothing. */
export function take(listing) {
  if (!live.value || newer(listing.generation, live.value.generation)) live.value = listing;
}

/** After an answer 412: what is live now, which the next attempt by `guard` is then about; null where it cannot be had. */
export async function catchUp(guard, error) {
  guard.generation = error.generation;
  try {
    const { data } = await call("GET", "/v1/erasures");
    take(data);
    guard.generation = data.generation;
    return data;
  } catch {
    return null; // the page shows it when the server answers again
  }
}

function newer(generation, than) {
  const [epoch, counter] = generation.split("-");
  const [thanEpoch, thanCounter] = than.split("-");
  return epoch !== thanEpoch || Number(counter) > Number(thanCounter);
}

/** Follow for as long as the page is open: by a stream, and by asking where or while there is none. */
export async function follow() {
  let streamsFrom = 0; // when to try a stream again; Infinity where the server has none
  let listsFrom = 0; // when to have lists read again
  for (;;) {
    try {
      if (performance.now() >= streamsFrom) {
        await readStream();
      } else {
        await ask();
        if (performance.now() >= listsFrom) {
          listsFrom = performance.now() + LISTS_EVERY;
          rangeSetsChanged.value += 1;
        }
        await rest(ASK_EVERY);
      }
    } catch (error) {
      following.value = error.status === 403 ? "refused" : "";
      if (error.status === 404 || error.status === 405) streamsFrom = Infinity;
      else if (error.status === 401 || error.status === 403) await keyChanges(error);
      else if (error instanceof Lost) await connection();
      else {
        if (performance.now() >= streamsFrom) streamsFrom = performance.now() + WITHOUT; // as many as it serves are open
        else await rest(error.retryAfter ? 1000 * error.retryAfter : PAUSE);
      }
    }
  }
}

async function ask() {
  const { data } = await call("GET", "/v1/erasures");
  following.value = "poll";
  expireOrTake(data);
}

/** An erasure that has ended by its time is gone from the list before there is a new generation. */
function expireOrTake(listing) {
  const known = live.value;
  if (known && known.generation === listing.generation && known.erasures.length !== listing.erasures.length) live.value = listing;
  else take(listing);
}

async function readStream() {
  const aborting = new AbortController();
  let silence = 0;
  const heard = () => {
    clearTimeout(silence);
    silence = setTimeout(() => aborting.abort(), SILENCE);
  };
  const usedKey = key.value;
  const changed = new AbortController();
  const began = performance.now();
  key.watch(() => aborting.abort(), changed.signal);
  try {
    heard();
    const response = await fetch(asked("/v1/events"), { headers: headers({ Accept: "text/event-stream" }), signal: aborting.signal, cache: "no-store" });
    if (!response.ok) throw await problemOf(response);
    following.value = "stream";
    connected.value ||= true;
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let kept = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      heard();
      const events = (kept + value).split(/\r?\n\r?\n/);
      kept = events.pop();
      events.forEach(handle);
    }
  } catch (error) {
    if (error.status) throw error;
    if (isAbort(error)) return usedKey === key.value ? rest(PAUSE) : undefined;
    lost();
    throw new Lost();
  } finally {
    clearTimeout(silence);
    changed.abort();
  }
  following.value = "";
  if (performance.now() - began < PAUSE) await rest(PAUSE); // the server ended it: it drains, and another one may answer
}

function handle(event) {
  let name = "";
  const data = [];
  for (const line of event.split(/\r?\n/)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (!data.length) return;
  const said = JSON.parse(data.join("\n"));
  if (name === "live") expireOrTake(said);
  if (name === "range_sets") rangeSetsChanged.value += 1;
  if (name === "jobs") jobs.value = said;
}

function keyChanges(error) {
  if (error.status === 401) askForKey(reasonFor(error));
  return once(key);
}

const connection = () => (connected.value ? undefined : once(connected));

function once(watched) {
  return new Promise((resolve) => {
    const heard = new AbortController();
    watched.watch(() => {
      heard.abort();
      resolve();
    }, heard.signal);
  });
}
