// A table of the scores without and with erasure, with bars.

import { button, el, userText } from "./elements.js";
import { percent, points } from "./format.js";

const SHOWN = 12; // labels, until all are requested

/** The table of one result; its `baseline` is null if there is nothing to compare. */
export function scoreTable(result, share, everything, showAll) {
  const { baseline } = result;
  const bare = new Map((baseline?.scores ?? []).map(({ label, score }) => [label, score]));
  const rows = result.scores.map(({ label, score }) => ({ label, score, before: bare.get(label) ?? null }));
  rows.sort((a, b) => Math.max(b.score, b.before ?? 0) - Math.max(a.score, a.before ?? 0));
  const shown = everything ? rows : rows.slice(0, SHOWN);
  return [
    el(
      "table",
      { class: "scores" },
      el("caption", { class: "unseen" }, "Score of every label, without erasure and erased"),
      el(
        "thead",
        {},
        el("tr", {}, el("th", { scope: "col" }, "Label"), baseline ? el("th", { scope: "col" }, "Without") : null, el("th", { scope: "col" }, baseline ? "Erased" : "Score"), baseline ? el("th", { scope: "col" }, "Change") : null),
      ),
      el("tbody", {}, shown.map((row) => scoreRow(row, result, share))),
    ),
    rows.length > shown.length ? button(`Show all ${rows.length} labels`, showAll, { class: "plain" }) : null,
  ];
}

function scoreRow({ label, score, before }, result, share) {
  const first = result.label === label;
  const was = result.baseline?.label === label;
  const change = before === null ? 0 : score - before;
  const text = (number) => (share ? percent(number) : number.toFixed(2));
  return [
    el(
      "tr",
      { class: first ? "first" : "" },
      el("th", { scope: "row" }, userText(label), first ? el("span", { class: "badge" }, result.baseline ? "best, erased" : "best") : null, was ? el("span", { class: "badge outline" }, "best, without") : null),
      before === null ? null : el("td", {}, text(before)),
      el("td", {}, text(score)),
      before === null ? null : el("td", { class: Math.abs(change) < 0.0005 ? "same" : change > 0 ? "up" : "down" }, share ? points(change) : change.toFixed(2)),
    ),
    share ? el("tr", { class: "bars", "aria-hidden": "true" }, el("td", { colspan: before === null ? 2 : 4 }, before === null ? null : bar("before", before), bar("after", score))) : null,
  ];
}

function bar(kind, share) {
  const filled = el("span", { class: `bar ${kind}` });
  filled.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return el("span", { class: "track" }, filled);
}
