// The part Range sets of the page Live: provenance, comparison of two, activation and rollback.

import { call } from "./api.js";
import { confirm, reasonField } from "./dialogs.js";
import { button, el, freshId, userText, refresh, table } from "./elements.js";
import { requireScope } from "./server-info.js";
import { reloadLive, live, rangeSetsChanged, updateLive } from "./updates.js";
import { empty, errorCard, loading } from "./notices.js";
import { count, moment } from "./format.js";

/** The part of the page. It reads the list again whenever range sets change. */
export function rangeSetsPart(signal) {
  const list = el("div", {}, loading("range sets"));
  const compared = el("div", {});
  const part = el("section", { class: "card", "aria-labelledby": "sets-title" }, el("h2", { id: "sets-title" }, "Range sets"), el("p", { class: "quiet" }, "Results of fits. Erasures use the active one. Choose two to compare where they come from."), list, compared);
  const picked = [];
  let drawn = "";
  const read = async () => {
    try {
      const { data } = await call("GET", "/v1/range-sets", { signal });
      const text = JSON.stringify(data.range_sets);
      if (signal.aborted || text === drawn) return; // so that a button stays in place while it is pressed
      drawn = text;
      draw(data.range_sets);
    } catch (error) {
      drawn = "";
      if (!signal.aborted) refresh(list, errorCard(error, read));
    }
  };
  const draw = (sets) => {
    const active = sets.find((each) => each.active);
    const drawCompared = () => {
      const [one, other] = picked.map((id) => sets.find((each) => each.id === id));
      compared.replaceChildren(...(one && other ? [comparison(one, other)] : []));
    };
    const pick = (id, box) => {
      if (box.checked) picked.push(id);
      else picked.splice(picked.indexOf(id), 1);
      if (picked.length > 2) {
        const dropped = picked.shift();
        const other = list.querySelector(`[data-set="${CSS.escape(dropped)}"]`);
        if (other) other.checked = false;
      }
      drawCompared();
    };
    refresh(list, sets.length ? el("ul", { class: "sets" }, sets.map((each) => item(each, active, picked, pick))) : empty("No range set is published", "neuronlens fit --model … --data … --activate makes one."));
    drawCompared();
  };
  rangeSetsChanged.subscribe(read, signal);
  read();
  return part;
}

function item(set, active, picked, pick) {
  const { corpus, settings } = set.provenance;
  const id = freshId("set");
  const box = el("input", { type: "checkbox", id, "data-set": set.id, "data-key": `compare ${set.id}`, checked: picked.includes(set.id), onchange: () => pick(set.id, box) });
  const older = active && set.published_at < active.published_at;
  return el(
    "li",
    { class: "erasure" },
    el(
      "div",
      {},
      el("h3", {}, el("code", {}, set.id), set.active ? el("span", { class: "badge" }, "active") : null),
      el("p", {}, userText(corpus.name), corpus.split ? [" / ", userText(corpus.split)] : null, `: ${count(Object.keys(corpus.counts).length, "concept")}, ${count(corpus.rows, "text")}, blocks ${settings.layers.join(", ")}`),
      el("p", { class: "quiet" }, `published ${moment(set.published_at)} · fitted ${moment(set.provenance.created_at)}`),
      el("details", { "data-key": `of ${set.id}` }, el("summary", { "data-key": `see ${set.id}` }, "Provenance"), table(`Provenance of ${set.id}`, ["Fact", "Value"], flat(set.provenance).map(([name, text]) => [name, userText(text)]), { class: "facts" })),
      el("div", { class: "tickbox" }, box, el("label", { for: id }, "Compare")),
    ),
    el("div", { class: "actions" }, set.active ? null : requireScope("admin", button(older ? "Roll back to it…" : "Activate…", () => activate(set, older), { "aria-label": `${older ? "Roll back to" : "Activate"} ${set.id}` }))),
  );
}

/** Every value of a provenance with its dotted name. */
function flat(value, name = "") {
  if (name === "created_at") return [[name, moment(value)]];
  if (value === null || typeof value !== "object") return [[name, value === null ? "none" : String(value)]];
  if (Array.isArray(value)) return [[name, value.join(", ")]];
  return Object.entries(value).flatMap(([part, each]) => flat(each, name ? `${name}.${part}` : part));
}

/** The differences between the provenance of two range sets, except when each was fitted. */
function comparison(one, other) {
  const [left, right] = [one, other].map(({ provenance: { created_at: _, ...rest } }) => new Map(flat(rest)));
  const names = [...new Set([...left.keys(), ...right.keys()])];
  const differing = names.filter((name) => left.get(name) !== right.get(name));
  return el(
    "div",
    { role: "region", "aria-label": "Comparison" },
    el("h3", {}, differing.length ? `${count(differing.length, "difference")} of ${names.length} facts` : `The same model, texts and settings: no difference in ${names.length} facts`),
    el("p", { class: "quiet" }, "This compares models, texts and settings, and the number of texts of each concept, not the ranges themselves."),
    differing.length ? table("Differences", ["Fact", one.id, other.id], differing.map((name) => [name, userText(left.get(name) ?? "–"), userText(right.get(name) ?? "–")]), { class: "facts" }) : null,
  );
}

function activate(set, older) {
  const guard = { generation: live.value?.generation };
  const reason = reasonField();
  let force = false;
  confirm({
    title: older ? "Roll back" : "Activate",
    content: el("div", {}, el("p", {}, "From the next request on, every server of this store uses ", el("code", {}, set.id), "."), reason.element),
    action: older ? "Roll back for everybody" : "Activate for everybody",
    run: async () => {
      const body = { id: set.id, reason: reason.value(), ...(force ? { force: true } : {}) };
      const { data } = await call("PUT", "/v1/range-sets/active", { body, ifMatch: guard.generation });
      updateLive(data);
    },
    refused: async (error) => {
      force = false;
      if (error.status === 412) {
        await reloadLive(guard, error);
        return el("p", { class: "note" }, "The live state has changed. Press the button again to continue with the current one.");
      }
      if (error.code !== "unresolvable_erasure") return null;
      const id = freshId("force");
      const box = el("input", { type: "checkbox", id, onchange: () => {
        force = box.checked;
      } });
      return el("div", { class: "tickbox" }, box, el("label", { for: id }, "Force: drop live erasures that cannot be resolved on it"));
    },
  });
}
