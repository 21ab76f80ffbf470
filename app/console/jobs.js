// Jobs: fits that run beside the server; how far they are, cancelling one, starting one. Hidden where there are none.

import { call, path } from "./api.js";
import { confirm, reasonField } from "./dialogs.js";
import { button, el, field, fill, freshId, quoted } from "./elements.js";
import { facts, may, needing } from "./facts.js";
import { following, jobs as told } from "./follow.js";
import { empty, failed } from "./notices.js";
import { count, duration, moment } from "./numbers.js";

const OVER = ["done", "failed", "cancelled"];
const ASK_EVERY = 2000; // milliseconds, while a job is under way and no stream tells of it

/** The part of the page; null where the server takes no jobs. */
export async function jobsPart(signal) {
  const list = el("div", {});
  const known = new Map();
  const items = new Map();
  let drawn = null;
  const draw = () => {
    const shown = [...known.values()].sort((a, b) => b.created_at - a.created_at).slice(0, 10);
    for (const job of shown) {
      if (!items.has(job.id)) items.set(job.id, item(see));
      items.get(job.id).show(job);
    }
    const order = shown.map(({ id }) => id).join();
    if (order === drawn) return; // a button that is being pressed stays where it is
    drawn = order;
    fill(list, shown.length ? el("ul", { class: "erasures" }, shown.map(({ id }) => items.get(id).element)) : empty("No fits yet", "A fit reads labelled texts and publishes a range set."));
  };
  const see = (job) => {
    if (OVER.includes(known.get(job.id)?.state) && !OVER.includes(job.state)) return; // an older word, that came late
    known.set(job.id, job);
    draw();
  };
  const read = async () => {
    const { data } = await call("GET", "/v1/jobs", { signal });
    known.clear();
    for (const job of data.jobs) known.set(job.id, job);
    draw();
  };
  try {
    await read();
  } catch (error) {
    if (error.status === 404 || error.status === 405 || signal.aborted) return null;
    fill(list, failed(error, read));
  }
  if (!may("fits") && !known.size) return null;
  if (known.has(told.value?.id)) see(told.value); // told while the list was read
  told.watch(see, signal);
  const asking = setInterval(() => {
    const busy = [...known.values()].some(({ state }) => !OVER.includes(state));
    if (busy && following.value === "poll") read().catch(() => {});
  }, ASK_EVERY);
  signal.addEventListener("abort", () => clearInterval(asking));
  return el(
    "section",
    { class: "card", "aria-labelledby": "jobs-title" },
    el("div", { class: "heading" }, el("h2", { id: "jobs-title" }, "Fits"), may("fits") ? needing("admin", button("Start a fit…", () => start(see))) : null),
    el("p", { class: "quiet" }, "They run beside the server, on files that it may read."),
    list,
  );
}

/** An element of the list, and how to show a job in it. */
function item(see) {
  let shown = null;
  const about = el("div", {});
  const stop = needing("admin", button("Cancel…", () => cancel(shown, see), { class: "danger" }));
  const show = (job) => {
    shown = job;
    const over = OVER.includes(job.state);
    const what = job.request?.data ?? job.request?.dataset ?? job.id;
    stop.hidden = over || job.state === "cancelling";
    stop.setAttribute("aria-label", `Cancel the fit of ${what}`);
    fill(
      about,
      el("h3", {}, quoted(what), el("span", { class: over ? "badge outline" : "badge" }, job.state)),
      over ? null : progress(job),
      el("p", { class: "quiet" }, `asked ${moment(job.created_at)} by `, quoted(job.by ?? "unknown"), job.ended_at ? ` · ended ${moment(job.ended_at)}` : null, job.range_set ? [" · range set ", el("code", {}, job.range_set)] : null),
      job.error ? el("p", { class: "problem-text" }, quoted(job.error)) : null,
    );
  };
  return { element: el("li", { class: "erasure" }, about, el("div", { class: "actions" }, stop)), show };
}

function progress({ progress: now }) {
  if (!now) return el("p", { class: "quiet" }, "Waiting for its turn.");
  const { phase, rows_done: done, rows_total: total, rows_per_second: rate, seconds_left: left } = now;
  const id = freshId("progress");
  const words = [phase, total ? `${done.toLocaleString("en")} of ${count(total, "text")}` : null, rate ? `${rate.toFixed(rate < 10 ? 1 : 0)} texts/s` : null, left ? `${duration(left)} left` : null];
  return el("div", {}, el("label", { for: id, class: "quiet" }, words.filter(Boolean).join(" · ")), el("progress", { id, max: total || null, value: total ? done : undefined }));
}

function cancel(job, see) {
  confirm({
    title: "Cancel the fit",
    content: el("p", {}, "It publishes nothing. What it has read so far is lost."),
    action: "Cancel the fit",
    dismiss: "Let it run",
    danger: true,
    run: async () => see((await call("DELETE", path("v1", "jobs", job.id))).data),
  });
}

function start(see) {
  const input = (type, props = {}) => el("input", { type, autocomplete: "off", ...props });
  const data = input("text", { required: true, placeholder: "news/train.jsonl" });
  const most = input("number", { min: 1, step: 1, placeholder: "all" });
  const activate = input("checkbox", { id: freshId("activate") });
  const all = input("checkbox", { id: freshId("all"), checked: true });
  const reason = reasonField();
  confirm({
    title: "Start a fit",
    content: el(
      "div",
      {},
      field("File, below the server’s directories for this", data),
      field("Texts at most", most),
      el("div", { class: "tickbox" }, all, el("label", { for: all.id }, `All ${facts.value.model.layers ?? "its"} blocks (else the last one)`)),
      el("div", { class: "tickbox" }, activate, el("label", { for: activate.id }, "Activate it when it is done")),
      reason.element,
    ),
    action: "Start it",
    run: async () => {
      const body = { data: data.value.trim(), layers: all.checked ? "all" : [-1], activate: activate.checked };
      if (most.value) body.max_rows = Number(most.value);
      if (reason.value()) body.reason = reason.value();
      see((await call("POST", "/v1/fits", { body })).data);
    },
  });
}
