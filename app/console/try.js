// Try: a text, what to erase, and the scores without and with it.

import { Problem, call, connected, isAbort } from "./api.js";
import { copy } from "./copy.js";
import { announce, button, el, freshId, quoted, refill } from "./elements.js";
import { examplesFor } from "./examples.js";
import { allowed, facts } from "./facts.js";
import { Latest } from "./latest.js";
import { live } from "./follow.js";
import { empty, failed } from "./notices.js";
import { count, percent, value } from "./numbers.js";
import { asCurl, asPython, bodyOf } from "./request.js";
import { scoreTable } from "./scores.js";
import { controls, inWords, parse, unusual } from "./settings.js";
import { keep, settle } from "./state.js";

const TYPING = 150; // milliseconds of rest after which a text is asked about

/** What stands under Try, for as long as the page is open. */
export const tried = { text: "", source: "chosen", concepts: [], settings: parse(new URLSearchParams()) };

function parameters() {
  return { text: tried.text, erase: tried.concepts, ...(tried.source === "live" ? { source: "live" } : {}), ...unusual(tried.settings) };
}

export function showTry(part, params, signal) {
  if ([...params].length) {
    tried.text = params.get("text") ?? "";
    tried.source = params.get("source") === "live" ? "live" : "chosen";
    tried.concepts = [...new Set(params.getAll("erase"))];
    tried.settings = parse(params);
  }
  const { model, concepts, layers, rankings, problem } = facts.value;
  const latest = new Latest();
  signal.addEventListener("abort", () => latest.stop());
  const out = el("div", { class: "card result", "aria-label": "Result", role: "region" });
  // on a narrow page the controls are below the result, and this keeps it in sight
  const strip = button("", () => out.scrollIntoView({ block: "start" }), { class: "strip", tabindex: "-1", "aria-hidden": "true" });
  let everything = false;
  let asked = null; // the body of the last question, unless it failed

  /** Something was changed: ask, unless that was the last question already. `again`: ask even so. */
  const changed = ({ again = false, ...when } = {}) => {
    keep("try", parameters());
    if (!allowed("infer")) {
      out.replaceChildren(failed(new Problem(403, { detail: "Classifying a text needs a key with scope infer." }, null)));
      return;
    }
    if (!tried.text.trim()) {
      latest.stop();
      asked = null;
      out.classList.remove("busy");
      strip.textContent = "";
      out.replaceChildren(empty("Nothing to classify yet", "Type a text, or take one of the examples."));
      return;
    }
    const body = bodyOf(tried, layers);
    const question = JSON.stringify(body);
    if (question === asked && !again) return; // such as a slider that moves while no concept is chosen
    asked = question;
    latest.soon((stop) => answer(body, stop), when);
  };

  async function answer(body, stop) {
    const slow = setTimeout(() => out.classList.add("busy"), 250);
    const started = performance.now();
    try {
      const { data, hidden } = await classify(body, stop);
      draw(data, body, performance.now() - started, hidden);
    } catch (error) {
      if (isAbort(error)) return;
      asked = null;
      strip.textContent = "";
      out.replaceChildren(failed(error, () => changed()));
    } finally {
      clearTimeout(slow);
      if (!stop.aborted) out.classList.remove("busy");
    }
  }

  function draw(data, body, milliseconds, hidden) {
    const [result] = data.results;
    const { baseline } = result;
    const share = result.scores.every(({ score }) => score >= 0 && score <= 1);
    const score = (number) => (share ? percent(number) : value(number, 2)); // a regression model's scores are no shares
    const moved = baseline && baseline.label !== result.label;
    const erased = data.erasure.concepts.length > 0;
    const headline = el("p", { class: "headline" }, baseline && erased ? [
      quoted(baseline.label),
      ` ${score(baseline.score)} `,
      el("span", { class: "arrow", "aria-label": "becomes" }, "→"),
      " ",
      quoted(result.label, { class: moved ? "moved" : "" }),
      ` ${score(result.score)}`,
    ] : [quoted(result.label), ` ${score(result.score)}`]);
    const masked = `${count(result.masked_neurons, "neuron")} masked at the read position`;
    refill(
      out,
      el("h2", {}, "Result"),
      headline,
      el("p", { class: "quiet" }, erased ? masked : tried.source === "live" ? "Nothing is erased live." : "Nothing is erased: choose a concept to see what changes."),
      hidden ? el("p", { class: "note" }, "An erasure is enforced, so the scores without it are shown to scope admin only.") : null,
      result.at_chance ? el("p", { class: "note" }, "At chance: nothing of the text is left in these scores. They are even, or what the model says of no text at all.") : null,
      result.truncated ? el("p", { class: "note" }, `The text is longer than the model reads: it was cut to ${model.max_tokens} tokens.`) : null,
      scoreTable(erased || hidden ? result : { ...result, baseline: null }, share, everything, () => {
        everything = true;
        draw(data, body, milliseconds, hidden);
      }),
      baseline && erased ? el("p", { class: "legend", "aria-hidden": "true" }, el("span", { class: "swatch before" }), "without erasure ", el("span", { class: "swatch after" }), "erased") : null,
      applied(data),
      el("p", { class: "quiet" }, `${count(data.usage.tokens, "token")} · answered in ${Math.round(milliseconds)} ms · generation `, el("code", {}, data.erasure.generation ?? "none")),
      el(
        "div",
        { class: "actions start" },
        button("Copy as curl", ({ currentTarget }) => copy(asCurl(body), "curl command", currentTarget)),
        button("Copy as Python", ({ currentTarget }) => copy(asPython(body), "Python program", currentTarget)),
        button("Copy link", ({ currentTarget }) => {
          settle();
          copy(location.href, "link", currentTarget);
        }),
      ),
    );
    strip.textContent = headline.textContent;
    announce(baseline && erased ? `${baseline.label} ${score(baseline.score)} without erasure, ${result.label} ${score(result.score)} erased. ${masked}.${result.at_chance ? " At chance." : ""}` : `${result.label} ${score(result.score)}.`);
  }

  const text = el("textarea", {
    rows: 4,
    placeholder: "A sentence to classify",
    "aria-describedby": "examples",
    oninput: () => {
      tried.text = text.value;
      changed({ wait: TYPING, rest: true });
    },
  });
  text.id = freshId("text");
  text.value = tried.text;
  const examples = el(
    "div",
    { class: "chips", id: "examples", role: "group", "aria-label": "Examples" },
    examplesFor([...model.labels, ...concepts.map(({ concept }) => concept)]).map(([name, example]) =>
      button(name, () => {
        text.value = example;
        tried.text = example;
        changed({ wait: 0 });
      }, { class: "chip", title: example }),
    ),
  );
  part.append(
    el("h1", { class: "unseen" }, "Try"),
    el(
      "div",
      { class: "columns" },
      el(
        "section",
        { class: "card text" },
        el("h2", {}, el("label", { for: text.id }, "Text")),
        text,
        examples,
      ),
      out,
      el(
        "section",
        { class: "card erase", "aria-label": "What is erased" },
        el("h2", {}, "Erase"),
        problem ? failed(problem) : null,
        conceptChoice(signal, changed),
        controls(tried.settings, { model, layers, rankings }, () => changed()),
      ),
    ),
    strip,
  );
  if (!allowed("infer")) for (const each of part.querySelectorAll("section :is(input, textarea, select, button)")) each.disabled = true;
  const enforcedNow = () => JSON.stringify(live.value?.erasures.filter(({ enforced }) => enforced) ?? []);
  let enforced = enforcedNow();
  live.watch(() => {
    const before = enforced;
    enforced = enforcedNow();
    if (tried.source === "live" || enforced !== before) changed({ again: true });
  }, signal);
  connected.watch((good) => good && changed({ again: true }), signal);
  changed({ wait: 0 });
}

/** Which concepts: chosen here, or those that are live. */
function conceptChoice(signal, changed) {
  const { concepts } = facts.value;
  const unknown = tried.concepts.filter((name) => !concepts.some(({ concept }) => concept === name)).map((concept) => ({ concept, texts: null }));
  const group = freshId("source");
  const boxes = el(
    "fieldset",
    { class: "chips" },
    el("legend", {}, "Concepts"),
    [...concepts, ...unknown].map(({ concept, texts }) => {
      const id = freshId("concept");
      const box = el("input", {
        type: "checkbox",
        id,
        checked: tried.concepts.includes(concept),
        onchange: () => {
          tried.concepts = box.checked ? [...tried.concepts, concept] : tried.concepts.filter((name) => name !== concept);
          changed();
        },
      });
      return el("span", { class: "tick" }, box, el("label", { for: id, class: "chip", title: texts === null ? `${concept}: not in the active range set` : `${concept}: fitted on ${count(texts, "text")}` }, quoted(concept)));
    }),
    concepts.length ? null : el("p", { class: "quiet" }, "None are known: no range set is active, or the key may not look."),
  );
  const liveNow = el("p", { class: "quiet" });
  const sayLive = () => {
    const erasures = live.value?.erasures ?? [];
    liveNow.replaceChildren("Live now: ", ...(erasures.length ? erasures.flatMap(({ concept }, at) => [at ? ", " : "", quoted(concept)]) : ["nothing"]), ". Its settings are under ", el("a", { href: "#/live" }, "Live"), ".");
  };
  const apply = () => {
    boxes.hidden = tried.source === "live";
    liveNow.hidden = tried.source !== "live";
    boxes.closest(".card")?.classList.toggle("by-live", tried.source === "live");
  };
  const option = (value, label) => {
    const id = freshId("source");
    return [
      el("input", {
        type: "radio",
        id,
        name: group,
        checked: tried.source === value,
        onchange: () => {
          tried.source = value;
          apply();
          changed();
        },
      }),
      el("label", { for: id }, label),
    ];
  };
  sayLive();
  live.watch(sayLive, signal);
  queueMicrotask(apply);
  return el("div", { class: "settings-group" }, el("fieldset", { class: "segments" }, el("legend", {}, "What to erase"), option("chosen", "Chosen here"), option("live", "What is live")), boxes, liveNow);
}

/** What was applied, as the reply says it. */
function applied({ erasure }) {
  if (!erasure.erasures.length) return null;
  return el(
    "details",
    {},
    el("summary", {}, `Applied: ${count(erasure.erasures.length, "erasure")}, ${erasure.source === "live" ? "live" : "of this request"}`),
    el("ul", {}, erasure.erasures.map((each) => el("li", {}, quoted(each.concept), `: ${inWords(each)}${each.enforced ? ", enforced" : ""}`))),
    el("p", { class: "quiet" }, "Range set ", el("code", {}, erasure.range_set ?? "none")),
  );
}

/** Ask with the baseline beside it; where an enforced erasure forbids that, without. */
async function classify(body, signal) {
  try {
    return { ...(await call("POST", "/v1/classify", { body, signal })), hidden: false };
  } catch (error) {
    if (error.status !== 403 || !error.message.startsWith("compare")) throw error;
    const { compare, ...plain } = body;
    return { ...(await call("POST", "/v1/classify", { body: plain, signal })), hidden: compare };
  }
}
