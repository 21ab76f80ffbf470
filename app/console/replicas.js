// Where several replicas report: on how many of them what is live is in force already.

import { Lost, Problem, call, isAbort } from "./api.js";
import { el, fill, quoted } from "./elements.js";
import { live } from "./follow.js";
import { Latest } from "./latest.js";

const AGAIN = 500; // milliseconds between two looks while some stay behind
const NAMED = 3; // most of those that are named

/** A line that says so after every change, and nothing where one process is all there is. */
export function replicasLine(signal) {
  const line = el("p", { class: "quiet", "aria-live": "polite" });
  const latest = new Latest();
  const look = async (asking) => {
    try {
      const { data } = await call("GET", "/v1/replicas", { signal: asking });
      const behind = data.replicas.filter(({ current }) => !current).map(({ name }) => name);
      fill(line, data.replicas.length > 1 ? words(data.replicas.length, behind) : null);
      if (behind.length) latest.soon(look, { wait: AGAIN });
    } catch (error) {
      if (error instanceof Problem || error instanceof Lost) fill(line);
      else if (!isAbort(error)) throw error;
    }
  };
  latest.soon(look);
  live.watch(() => latest.soon(look), signal);
  signal.addEventListener("abort", () => latest.stop());
  return line;
}

function words(all, behind) {
  const names = behind.slice(0, NAMED).flatMap((name, at) => [at ? ", " : "; not yet: ", quoted(name)]);
  return [`In force on ${all - behind.length} of ${all} replicas`, names, behind.length > NAMED ? ", …" : ""];
}
