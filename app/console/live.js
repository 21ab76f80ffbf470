// Live: what is erased now, by whom, since when, until when; switching it on, changing it, switching it off.

import { call, ofConcept, path } from "./api.js";
import { confirm, reasonField } from "./dialogs.js";
import { announce, button, choice, el, field, freshId, quoted, refill } from "./elements.js";
import { allowed, facts, needing } from "./facts.js";
import { catchUp, following, live, take } from "./follow.js";
import { jobsPart } from "./jobs.js";
import { empty, failed, loading } from "./notices.js";
import { duration, moment } from "./numbers.js";
import { rangeSetsPart } from "./rangesets.js";
import { replicasLine } from "./replicas.js";
import { asRequest, controls, DEFAULTS, inWords, ofErasure } from "./settings.js";
import { tried } from "./try.js";

export async function showLive(part, params, signal) {
  const list = el("div", {}, live.value ? null : loading("what is live"));
  const generation = el("p", { class: "quiet" });
  const on = needing("admin", button("Switch on…", () => switchOn(), { class: "primary", disabled: !left().length }));
  part.append(
    el("h1", { class: "unseen" }, "Live"),
    el(
      "section",
      { class: "card", "aria-labelledby": "live-title" },
      el("div", { class: "heading" }, el("h2", { id: "live-title" }, "Erased now"), on),
      el("p", { class: "quiet" }, "This applies to every request that names nothing itself; what is enforced applies to every request."),
      allowed("admin") ? null : el("p", { class: "note" }, "This key may not change anything: that needs a key with scope admin."),
      list,
      generation,
      replicasLine(signal),
    ),
  );
  const draw = () => {
    const listing = live.value;
    if (!listing) return;
    on.disabled = !allowed("admin") || !left().length;
    refill(
      list,
      listing.erasures.length ? el("ul", { class: "erasures" }, listing.erasures.map(item)) : empty("Nothing is erased", "Every concept goes through as the model has it."),
    );
    generation.replaceChildren("Generation ", el("code", {}, listing.generation), ...(listing.range_set ? [" · range set ", el("code", {}, listing.range_set)] : []));
  };
  draw();
  live.watch((listing) => {
    draw();
    announce(listing.erasures.length ? `Erased now: ${listing.erasures.map(({ concept }) => concept).join(", ")}` : "Nothing is erased now");
  }, signal);
  const ticking = setInterval(() => {
    // a minute hand for "ends in", without drawing what has the focus anew
    for (const time of list.querySelectorAll("[data-ends]")) time.textContent = endsIn(Number(time.dataset.ends));
  }, 1000);
  signal.addEventListener("abort", () => clearInterval(ticking));
  if (!live.value && !["stream", "poll"].includes(following.value)) {
    try {
      take((await call("GET", "/v1/erasures", { signal })).data);
    } catch (error) {
      if (signal.aborted) return;
      list.replaceChildren(failed(error));
    }
  }
  part.append(rangeSetsPart(signal));
  const fits = await jobsPart(signal);
  if (fits) part.append(fits);
}

const endsIn = (at) => `ends in ${duration(at - Date.now() / 1000)} (${moment(at)})`;

function item(erasure) {
  return el(
    "li",
    { class: "erasure" },
    el(
      "div",
      {},
      el("h3", {}, quoted(erasure.concept), erasure.enforced ? el("span", { class: "badge" }, "enforced") : null),
      el("p", {}, inWords(erasure)),
      el(
        "p",
        { class: "quiet" },
        "since ",
        el("time", { datetime: new Date(1000 * erasure.since).toISOString() }, moment(erasure.since)),
        erasure.by ? [" by ", quoted(erasure.by)] : null,
        " · ",
        erasure.expires_at ? el("span", { "data-ends": erasure.expires_at }, endsIn(erasure.expires_at)) : "until it is switched off",
      ),
      erasure.reason ? el("p", { class: "reason" }, quoted(erasure.reason)) : null,
    ),
    el(
      "div",
      { class: "actions" },
      needing("admin", button("Change…", () => switchOn(erasure), { "aria-label": `Change ${erasure.concept}` })),
      needing("admin", button("Switch off…", () => switchOff(erasure.concept), { class: "danger", "aria-label": `Switch off ${erasure.concept}` })),
    ),
  );
}

/** What is done to an answer 412: the current state is read, and the next attempt is about it. It says what that would replace. */
function whenStale(guard, concept) {
  return async (error) => {
    if (error.status !== 412) return null;
    const now = await catchUp(guard, error);
    const there = now?.erasures.find((each) => each.concept === concept());
    const says = there
      ? [quoted(there.concept), ` is erased now: ${inWords(there)}${there.enforced ? ", enforced" : ""}`, there.by ? [", by ", quoted(there.by)] : null, ". The same button replaces that."]
      : ["The list behind this dialog shows what is live now. Look at it; the same button changes it all the same."];
    return el("p", { class: "note" }, says);
  };
}

const TIMES = [["", "never"], [900, "in 15 minutes"], [3600, "in an hour"], [28800, "in 8 hours"], [86400, "in a day"], [604800, "in a week"]];

/** Concepts that are not erased now: the others are changed, not switched on, so that what was set for them is kept. */
function left() {
  const erased = new Set(live.value?.erasures.map(({ concept }) => concept));
  return facts.value.concepts.map(({ concept }) => concept).filter((concept) => !erased.has(concept));
}

function switchOn(erasure = null) {
  const { model, layers, rankings } = facts.value;
  const concepts = erasure ? [erasure.concept] : left();
  const settings = erasure ? ofErasure(erasure, layers) : { ...DEFAULTS, ...tried.settings };
  const chosen = { concept: tried.concepts.find((concept) => concepts.includes(concept)) ?? concepts[0], seconds: "", enforced: erasure?.enforced ?? false };
  const guard = { generation: live.value?.generation };
  const reason = reasonField(erasure?.reason ?? "");
  const enforced = el("input", { type: "checkbox", id: freshId("enforced"), checked: chosen.enforced });
  const remaining = erasure?.expires_at ? Math.max(1, Math.round(erasure.expires_at - Date.now() / 1000)) : null;
  if (remaining) chosen.seconds = String(remaining);
  const times = remaining ? [[remaining, `as it is now, in ${duration(remaining)}`], ...TIMES] : TIMES;
  confirm({
    title: erasure ? `Change ${erasure.concept}` : "Switch an erasure on",
    content: el(
      "div",
      {},
      erasure ? null : field("Concept", choice(concepts.map((concept) => [concept, concept]), chosen.concept, (value) => {
        chosen.concept = value;
      })),
      controls(settings, { model, layers, rankings }, () => {}),
      field("Ends", choice(times, chosen.seconds, (value) => {
        chosen.seconds = value;
      })),
      el("div", { class: "tickbox" }, enforced, el("label", { for: enforced.id }, "Enforced: join it to every request, whatever that asks for")),
      reason.element,
    ),
    action: erasure ? "Change it for everybody" : "Switch it on for everybody",
    run: async () => {
      const body = { ...asRequest(settings, layers), enforced: enforced.checked, reason: reason.value(), ...(chosen.seconds ? { expires_in: Number(chosen.seconds) } : {}) };
      const { at, named } = ofConcept(chosen.concept);
      take((await call("PUT", path("v1", "erasures", at), { body, query: named, ifMatch: guard.generation })).data);
    },
    refused: whenStale(guard, () => chosen.concept),
  });
}

function switchOff(concept) {
  const guard = { generation: live.value?.generation };
  const reason = reasonField();
  confirm({
    title: `Switch ${concept} off`,
    content: el("div", {}, el("p", {}, "Requests that name nothing are no longer answered without ", quoted(concept), "."), reason.element),
    action: "Switch it off for everybody",
    danger: true,
    run: async () => {
      const { at, named } = ofConcept(concept);
      take((await call("DELETE", path("v1", "erasures", at), { query: { ...named, reason: reason.value() }, ifMatch: guard.generation })).data);
    },
    refused: whenStale(guard, () => concept),
  });
}
