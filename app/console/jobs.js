// The part Fits of the page Live: progress, cancelling, starting. Hidden if the server takes no fits and has none.

import { call, path } from "./api.js";
import { confirm, reasonField } from "./dialogs.js";
import { button, el, field, fill, freshId, userText } from "./elements.js";
import { serverInfo, hasFeature, requireScope } from "./server-info.js";
import { updateMode, latestJob } from "./updates.js";
import { empty, errorCard } from "./notices.js";
import { count, duration, moment } from "./format.js";

const ENDED = ["done", "failed", "cancelled"];
const POLL_EVERY = 2000; // milliseconds, while a job runs and there is no stream

/** The part of the page; null if it is hidden. */
export async function jobsPart(signal) {
  const list = el("div", {});
  const known = new Map();
  const items = new Map();
  let drawn = null;
  const draw = () => {
    const shown = [...known.values()].sort((a, b) => b.created_at - a.created_at).slice(0, 10);
    for (const job of shown) {
      if (!items.has(job.id)) items.set(job.id, item(update));
      items.get(job.id).show(job);
    }
    const order = shown.map(({ id }) => id).join();
    if (order === drawn) return; // so that a button stays in place while it is pressed
    drawn = order;
    fill(list, shown.length ? el("ul", { class: "erasures" }, shown.map(({ id }) => items.get(id).element)) : empty("No fits yet", "A fit reads labelled texts and publishes a range set."));
  };
  const update = (job) => {
    if (ENDED.includes(known.get(job.id)?.state) && !ENDED.includes(job.state)) return; // an older state that arrived late
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
    fill(list, errorCard(error, read));
  }
  if (!hasFeature("fits") && !known.size) return null;
  if (known.has(latestJob.value?.id)) update(latestJob.value); // it changed while the list was read
  latestJob.subscribe(update, signal);
  const polling = setInterval(() => {
    const busy = [...known.values()].some(({ state }) => !ENDED.includes(state));
    if (busy && updateMode.value === "poll") read().catch(() => {});
  }, POLL_EVERY);
  signal.addEventListener("abort", () => clearInterval(polling));
  return el(
    "section",
    { class: "card", "aria-labelledby": "jobs-title" },
    el("div", { class: "heading" }, el("h2", { id: "jobs-title" }, "Fits"), hasFeature("fits") ? requireScope("admin", button("Start a fit…", () => start(update))) : null),
    el("p", { class: "quiet" }, "A fit runs in a process of its own, on a file that the server may read."),
    list,
  );
}

/** An element of the list, with a function that shows a job in it. */
function item(update) {
  let shown = null;
  const about = el("div", {});
  const stop = requireScope("admin", button("Cancel…", () => cancel(shown, update), { class: "danger" }));
  const show = (job) => {
    shown = job;
    const ended = ENDED.includes(job.state);
    const what = job.request?.data ?? job.request?.dataset ?? job.id;
    stop.hidden = ended || job.state === "cancelling";
    stop.setAttribute("aria-label", `Cancel the fit of ${what}`);
    fill(
      about,
      el("h3", {}, userText(what), el("span", { class: ended ? "badge outline" : "badge" }, job.state)),
      ended ? null : progress(job),
      el("p", { class: "quiet" }, `requested ${moment(job.created_at)} by `, userText(job.by ?? "unknown"), job.ended_at ? ` · ended ${moment(job.ended_at)}` : null, job.range_set ? [" · range set ", el("code", {}, job.range_set)] : null),
      job.error ? el("p", { class: "problem-text" }, userText(job.error)) : null,
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

function cancel(job, update) {
  confirm({
    title: "Cancel the fit",
    content: el("p", {}, "It publishes nothing, and its progress is lost."),
    action: "Cancel the fit",
    dismiss: "Keep it running",
    danger: true,
    run: async () => update((await call("DELETE", path("v1", "jobs", job.id))).data),
  });
}

function start(update) {
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
      field("File, relative to the server’s fit directories", data),
      field("Maximum number of texts", most),
      el("div", { class: "tickbox" }, all, el("label", { for: all.id }, `All ${serverInfo.value.model.layers ?? "its"} blocks (otherwise the last one)`)),
      el("div", { class: "tickbox" }, activate, el("label", { for: activate.id }, "Activate the range set when the fit is done")),
      reason.element,
    ),
    action: "Start the fit",
    run: async () => {
      const body = { data: data.value.trim(), layers: all.checked ? "all" : [-1], activate: activate.checked };
      if (most.value) body.max_rows = Number(most.value);
      if (reason.value()) body.reason = reason.value();
      update((await call("POST", "/v1/fits", { body })).data);
    },
  });
}
