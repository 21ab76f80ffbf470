// The page Evaluation: reports of `neuronlens evaluate`.

import { call, isAbort, path } from "./api.js";
import { button, el, fill, userText } from "./elements.js";
import { empty, errorCard, loading } from "./notices.js";
import { count, moment } from "./format.js";
import { setAddress } from "./address.js";

const PAGE = "report.html";

export async function showEvaluation(part, params, signal) {
  const list = el("div", {}, loading("reports"));
  const opened = el("div", {});
  part.append(
    el("h1", { class: "unseen" }, "Evaluation"),
    el("section", { class: "card", "aria-labelledby": "reports-title" }, el("h2", { id: "reports-title" }, "Reports"), el("p", { class: "quiet" }, "What ", el("code", {}, "neuronlens evaluate"), " measured, newest first."), list),
    opened,
  );
  const read = async () => {
    fill(list, loading("reports"));
    try {
      const { data } = await call("GET", "/v1/reports", { signal });
      draw(data.reports);
    } catch (error) {
      if (isAbort(error) || signal.aborted) return;
      if (error.status === 404) fill(list, empty("No reports here", "This server does not serve reports."));
      else fill(list, errorCard(error, read));
    }
  };
  const draw = (reports) => {
    if (!reports.length) {
      fill(list, empty("No reports yet", "neuronlens evaluate … writes one here if it runs without --out. NEURONLENS_REPORTS_DIR sets another directory."));
      return;
    }
    fill(list, el("ul", { class: "erasures" }, reports.map((report) => item(report, open))));
    const wanted = reports.find(({ id, files }) => id === params.get("report") && files.includes(PAGE));
    if (wanted) open(wanted);
  };
  const open = async (report) => {
    setAddress("evaluation", { report: report.id });
    for (const each of list.querySelectorAll("[data-report]")) each.setAttribute("aria-pressed", String(each.dataset.report === report.id));
    fill(opened, loading("the report"));
    try {
      const { data } = await call("GET", path("v1", "reports", report.id, PAGE), { signal, text: true });
      fill(opened, el("section", { class: "card", "aria-label": "Report" }, el("div", { class: "heading" }, el("h2", {}, userText(report.id)), button("Close", () => {
        setAddress("evaluation", {});
        fill(opened);
        list.querySelector(`[data-report="${CSS.escape(report.id)}"]`)?.focus();
      })), frame(report.id, data, signal)));
      opened.scrollIntoView({ block: "start" });
    } catch (error) {
      if (isAbort(error) || signal.aborted) return;
      fill(opened, errorCard(error, () => open(report)));
    }
  };
  await read();
}

function item(report, open) {
  const { id, state, files, model, data, texts, targets, methods } = report;
  const about = [model ? ["of ", userText(model)] : null, data ? ["on ", userText(data), texts === null ? "" : ` (${count(texts, "text")})`] : null, targets.length ? count(targets.length, "target") : null, methods.length ? methods.join(", ") : null].filter(Boolean);
  return el(
    "li",
    { class: "erasure" },
    el(
      "div",
      {},
      el("h3", {}, userText(id), state === "complete" ? null : el("span", { class: "badge outline" }, state)),
      el("p", {}, about.map((each, at) => [at ? " · " : "", each])),
      el("p", { class: "quiet" }, `written ${moment(report.created_at)}`),
    ),
    el("div", { class: "actions" }, files.includes(PAGE) ? button("Open", () => open(report), { "data-report": id, "aria-pressed": "false", "aria-label": `Open ${id}` }) : null),
  );
}

/** A frame with an origin of its own, so that the report's scripts reach nothing else. */
function frame(name, html, signal) {
  const element = el("iframe", { src: "/console/report-frame.html", sandbox: "allow-scripts", title: `Report ${name}`, class: "report", referrerpolicy: "no-referrer" });
  addEventListener(
    "message",
    ({ source, data }) => {
      if (source === element.contentWindow && data === "ready") element.contentWindow.postMessage({ report: html }, "*");
    },
    { signal },
  );
  return element;
}
