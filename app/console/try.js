// The page Try: a text, what to erase, and the scores without and with the erasure.

import { Problem, call, connected, isAbort } from "./api.js";
import { copy } from "./clipboard.js";
import { announce, button, el, freshId, userText, refresh } from "./elements.js";
import { examplesFor } from "./examples.js";
import { hasScope, serverInfo } from "./server-info.js";
import { LatestCall } from "./latest-call.js";
import { live } from "./updates.js";
import { empty, errorCard } from "./notices.js";
import { count, percent, value } from "./format.js";
import { curlCommand, pythonProgram, classifyBody } from "./request.js";
import { scoreTable } from "./scores.js";
import { settingsControls, describe, parseSettings, nonDefault } from "./erasure-settings.js";
import { setAddress, flushAddress } from "./address.js";

const TYPING = 150; // milliseconds after the last key before a request is sent

/** The inputs of this page, kept while other pages are shown. */
export const tryState = { text: "", source: "chosen", concepts: [], settings: parseSettings(new URLSearchParams()) };

function parameters() {
  return { text: tryState.text, erase: tryState.concepts, ...(tryState.source === "live" ? { source: "live" } : {}), ...nonDefault(tryState.settings) };
}

export function showTry(part, params, signal) {
  if ([...params].length) {
    tryState.text = params.get("text") ?? "";
    tryState.source = params.get("source") === "live" ? "live" : "chosen";
    tryState.concepts = [...new Set(params.getAll("erase"))];
    tryState.settings = parseSettings(params);
  }
  const { model, concepts, layers, rankings, problem } = serverInfo.value;
  const latest = new LatestCall();
  signal.addEventListener("abort", () => latest.cancel());
  const out = el("div", { class: "card result", "aria-label": "Result", role: "region" });
  // on a narrow screen the controls are below the result, and this strip keeps the result in sight
  const strip = button("", () => out.scrollIntoView({ block: "start" }), { class: "strip", tabindex: "-1", "aria-hidden": "true" });
  let everything = false;
  let sent = null; // the body of the last request, unless it failed

  /** Classify after a change, unless the request is the same as the last one. `again`: even then. */
  const changed = ({ again = false, ...when } = {}) => {
    setAddress("try", parameters());
    if (!hasScope("infer")) {
      out.replaceChildren(errorCard(new Problem(403, { detail: "Classifying a text needs a key with scope infer." }, null)));
      return;
    }
    if (!tryState.text.trim()) {
      latest.cancel();
      sent = null;
      out.classList.remove("busy");
      strip.textContent = "";
      out.replaceChildren(empty("Nothing to classify yet", "Type a text or choose an example."));
      return;
    }
    const body = classifyBody(tryState, layers);
    const request = JSON.stringify(body);
    if (request === sent && !again) return; // for example a slider that moves while no concept is chosen
    sent = request;
    latest.schedule((stop) => answer(body, stop), when);
  };

  async function answer(body, stop) {
    const slow = setTimeout(() => out.classList.add("busy"), 250);
    const started = performance.now();
    try {
      const { data, hidden } = await classify(body, stop);
      draw(data, body, performance.now() - started, hidden);
    } catch (error) {
      if (isAbort(error)) return;
      sent = null;
      strip.textContent = "";
      out.replaceChildren(errorCard(error, () => changed()));
    } finally {
      clearTimeout(slow);
      if (!stop.aborted) out.classList.remove("busy");
    }
  }

  function draw(data, body, milliseconds, hidden) {
    const [result] = data.results;
    const { baseline } = result;
    const share = result.scores.every(({ score }) => score >= 0 && score <= 1);
    const score = (number) => (share ? percent(number) : value(number, 2)); // a regression model's scores are not shares
    const moved = baseline && baseline.label !== result.label;
    const erased = data.erasure.concepts.length > 0;
    const headline = el("p", { class: "headline" }, baseline && erased ? [
      userText(baseline.label),
      ` ${score(baseline.score)} `,
      el("span", { class: "arrow", "aria-label": "becomes" }, "→"),
      " ",
      userText(result.label, { class: moved ? "moved" : "" }),
      ` ${score(result.score)}`,
    ] : [userText(result.label), ` ${score(result.score)}`]);
    const masked = `${count(result.masked_neurons, "neuron")} masked at the read position`;
    refresh(
      out,
      el("h2", {}, "Result"),
      headline,
      el("p", { class: "quiet" }, erased ? masked : tryState.source === "live" ? "Nothing is erased live." : "Nothing is erased: choose a concept to see what changes."),
      hidden ? el("p", { class: "note" }, "An erasure is enforced, so the scores without it need a key with scope admin.") : null,
      result.at_chance ? el("p", { class: "note" }, "At chance: the erasure left nothing of the text in these scores. They are even, or those of an empty text.") : null,
      result.truncated ? el("p", { class: "note" }, `The text was cut to ${model.max_tokens} tokens, the most that the model reads.`) : null,
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
        button("Copy as curl", ({ currentTarget }) => copy(curlCommand(body), "curl command", currentTarget)),
        button("Copy as Python", ({ currentTarget }) => copy(pythonProgram(body), "Python program", currentTarget)),
        button("Copy link", ({ currentTarget }) => {
          flushAddress();
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
      tryState.text = text.value;
      changed({ wait: TYPING, rest: true });
    },
  });
  text.id = freshId("text");
  text.value = tryState.text;
  const examples = el(
    "div",
    { class: "chips", id: "examples", role: "group", "aria-label": "Examples" },
    examplesFor([...model.labels, ...concepts.map(({ concept }) => concept)]).map(([name, example]) =>
      button(name, () => {
        text.value = example;
        tryState.text = example;
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
        problem ? errorCard(problem) : null,
        conceptChoice(signal, changed),
        settingsControls(tryState.settings, { model, layers, rankings }, () => changed()),
      ),
    ),
    strip,
  );
  if (!hasScope("infer")) for (const each of part.querySelectorAll("section :is(input, textarea, select, button)")) each.disabled = true;
  const enforcedNow = () => JSON.stringify(live.value?.erasures.filter(({ enforced }) => enforced) ?? []);
  let enforced = enforcedNow();
  live.subscribe(() => {
    const before = enforced;
    enforced = enforcedNow();
    if (tryState.source === "live" || enforced !== before) changed({ again: true });
  }, signal);
  connected.subscribe((good) => good && changed({ again: true }), signal);
  changed({ wait: 0 });
}

/** Choice of the erasures: concepts chosen here, or the live erasures. */
function conceptChoice(signal, changed) {
  const { concepts } = serverInfo.value;
  const unknown = tryState.concepts.filter((name) => !concepts.some(({ concept }) => concept === name)).map((concept) => ({ concept, texts: null }));
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
        checked: tryState.concepts.includes(concept),
        onchange: () => {
          tryState.concepts = box.checked ? [...tryState.concepts, concept] : tryState.concepts.filter((name) => name !== concept);
          changed();
        },
      });
      return el("span", { class: "tick" }, box, el("label", { for: id, class: "chip", title: texts === null ? `${concept}: not in the active range set` : `${concept}: fitted on ${count(texts, "text")}` }, userText(concept)));
    }),
    concepts.length ? null : el("p", { class: "quiet" }, "None: no range set is active, or the key has no scope read."),
  );
  const liveNow = el("p", { class: "quiet" });
  const sayLive = () => {
    const erasures = live.value?.erasures ?? [];
    liveNow.replaceChildren("Live now: ", ...(erasures.length ? erasures.flatMap(({ concept }, at) => [at ? ", " : "", userText(concept)]) : ["nothing"]), ". Its settings are under ", el("a", { href: "#/live" }, "Live"), ".");
  };
  const apply = () => {
    boxes.hidden = tryState.source === "live";
    liveNow.hidden = tryState.source !== "live";
    boxes.closest(".card")?.classList.toggle("by-live", tryState.source === "live");
  };
  const option = (value, label) => {
    const id = freshId("source");
    return [
      el("input", {
        type: "radio",
        id,
        name: group,
        checked: tryState.source === value,
        onchange: () => {
          tryState.source = value;
          apply();
          changed();
        },
      }),
      el("label", { for: id }, label),
    ];
  };
  sayLive();
  live.subscribe(sayLive, signal);
  queueMicrotask(apply);
  return el("div", { class: "settings-group" }, el("fieldset", { class: "segments" }, el("legend", {}, "What to erase"), option("chosen", "Chosen here"), option("live", "Live erasures")), boxes, liveNow);
}

/** The applied erasures of a reply. */
function applied({ erasure }) {
  if (!erasure.erasures.length) return null;
  return el(
    "details",
    {},
    el("summary", {}, `Applied: ${count(erasure.erasures.length, "erasure")}, ${erasure.source === "live" ? "live" : "of this request"}`),
    el("ul", {}, erasure.erasures.map((each) => el("li", {}, userText(each.concept), `: ${describe(each)}${each.enforced ? ", enforced" : ""}`))),
    el("p", { class: "quiet" }, "Range set ", el("code", {}, erasure.range_set ?? "none")),
  );
}

/** Classify with the baseline, or without it if an enforced erasure forbids it. */
async function classify(body, signal) {
  try {
    return { ...(await call("POST", "/v1/classify", { body, signal })), hidden: false };
  } catch (error) {
    if (error.status !== 403 || !error.message.startsWith("compare")) throw error;
    const { compare, ...plain } = body;
    return { ...(await call("POST", "/v1/classify", { body: plain, signal })), hidden: compare };
  }
}
