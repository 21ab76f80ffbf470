// With several replicas: how many of them use the current live state.

import { ConnectionLost, Problem, call, isAbort } from "./api.js";
import { el, fill, userText } from "./elements.js";
import { live } from "./updates.js";
import { LatestCall } from "./latest-call.js";

const CHECK_EVERY = 500; // milliseconds, while a replica is behind
const NAMED = 3; // the most replicas to name

/** A line that is updated after every change, and empty if there is one replica only. */
export function replicasLine(signal) {
  const line = el("p", { class: "quiet", "aria-live": "polite" });
  const latest = new LatestCall();
  const update = async (asking) => {
    try {
      const { data } = await call("GET", "/v1/replicas", { signal: asking });
      const behind = data.replicas.filter(({ current }) => !current).map(({ name }) => name);
      fill(line, data.replicas.length > 1 ? words(data.replicas.length, behind) : null);
      if (behind.length) latest.schedule(update, { wait: CHECK_EVERY });
    } catch (error) {
      if (error instanceof Problem || error instanceof ConnectionLost) fill(line);
      else if (!isAbort(error)) throw error;
    }
  };
  latest.schedule(update);
  live.subscribe(() => latest.schedule(update), signal);
  signal.addEventListener("abort", () => latest.cancel());
  return line;
}

function words(all, behind) {
  const names = behind.slice(0, NAMED).flatMap((name, at) => [at ? ", " : "; not yet: ", userText(name)]);
  return [`In force on ${all - behind.length} of ${all} replicas`, names, behind.length > NAMED ? ", …" : ""];
}
