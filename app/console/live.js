// The page Live: the live erasures, who switched them on and when; switching on, changing, switching off.

import { call, conceptPath, path } from "./api.js";
import { confirm, reasonField } from "./dialogs.js";
import { announce, button, dropDown, el, field, freshId, userText, refresh } from "./elements.js";
import { hasScope, serverInfo, requireScope } from "./server-info.js";
import { reloadLive, updateMode, live, updateLive } from "./updates.js";
import { jobsPart } from "./jobs.js";
import { empty, errorCard, loading } from "./notices.js";
import { duration, moment } from "./format.js";
import { rangeSetsPart } from "./range-sets.js";
import { replicasLine } from "./replicas.js";
import { asRequest, settingsControls, DEFAULTS, describe, settingsOf } from "./erasure-settings.js";
import { tryState } from "./try.js";

export async function showLive(part, params, signal) {
  const list = el("div", {}, live.value ? null : loading("what is live"));
  const generation = el("p", { class: "quiet" });
  const on = requireScope("admin", button("Switch on…", () => switchOn(), { class: "primary", disabled: !availableConcepts().length }));
  part.append(
    el("h1", { class: "unseen" }, "Live"),
    el(
      "section",
      { class: "card", "aria-labelledby": "live-title" },
      el("div", { class: "heading" }, el("h2", { id: "live-title" }, "Erased now"), on),
      el("p", { class: "quiet" }, "Live erasures apply to every request that names none. Enforced ones apply to every request."),
      hasScope("admin") ? null : el("p", { class: "note" }, "Changes need a key with scope admin."),
      list,
      generation,
      replicasLine(signal),
    ),
  );
  const draw = () => {
    const listing = live.value;
    if (!listing) return;
    on.disabled = !hasScope("admin") || !availableConcepts().length;
    refresh(
      list,
      listing.erasures.length ? el("ul", { class: "erasures" }, listing.erasures.map(item)) : empty("Nothing is erased", "The model answers as it is."),
    );
    generation.replaceChildren("Generation ", el("code", {}, listing.generation), ...(listing.range_set ? [" · range set ", el("code", {}, listing.range_set)] : []));
  };
  draw();
  live.subscribe((listing) => {
    draw();
    announce(listing.erasures.length ? `Erased now: ${listing.erasures.map(({ concept }) => concept).join(", ")}` : "Nothing is erased now");
  }, signal);
  const ticking = setInterval(() => {
    // update "ends in" without redrawing the list, which would lose the focus
    for (const time of list.querySelectorAll("[data-ends]")) time.textContent = endsIn(Number(time.dataset.ends));
  }, 1000);
  signal.addEventListener("abort", () => clearInterval(ticking));
  if (!live.value && !["stream", "poll"].includes(updateMode.value)) {
    try {
      updateLive((await call("GET", "/v1/erasures", { signal })).data);
    } catch (error) {
      if (signal.aborted) return;
      list.replaceChildren(errorCard(error));
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
      el("h3", {}, userText(erasure.concept), erasure.enforced ? el("span", { class: "badge" }, "enforced") : null),
      el("p", {}, describe(erasure)),
      el(
        "p",
        { class: "quiet" },
        "since ",
        el("time", { datetime: new Date(1000 * erasure.since).toISOString() }, moment(erasure.since)),
        erasure.by ? [" by ", userText(erasure.by)] : null,
        " · ",
        erasure.expires_at ? el("span", { "data-ends": erasure.expires_at }, endsIn(erasure.expires_at)) : "until it is switched off",
      ),
      erasure.reason ? el("p", { class: "reason" }, userText(erasure.reason)) : null,
    ),
    el(
      "div",
      { class: "actions" },
      requireScope("admin", button("Change…", () => switchOn(erasure), { "aria-label": `Change ${erasure.concept}` })),
      requireScope("admin", button("Switch off…", () => switchOff(erasure.concept), { class: "danger", "aria-label": `Switch off ${erasure.concept}` })),
    ),
  );
}

/** After status 412: reads the live state, which the next attempt then replaces, and says what that would replace. */
function onStale(guard, concept) {
  return async (error) => {
    if (error.status !== 412) return null;
    const now = await reloadLive(guard, error);
    const there = now?.erasures.find((each) => each.concept === concept());
    const says = there
      ? [userText(there.concept), ` is erased now: ${describe(there)}${there.enforced ? ", enforced" : ""}`, there.by ? [", by ", userText(there.by)] : null, ". Press the button again to replace it."]
      : ["The list behind this dialog shows the current live erasures. Press the button again to make the change anyway."];
    return el("p", { class: "note" }, says);
  };
}

const TIMES = [["", "never"], [900, "in 15 minutes"], [3600, "in an hour"], [28800, "in 8 hours"], [86400, "in a day"], [604800, "in a week"]];

/** Concepts that are not erased live. The others are changed instead, so that their settings are kept. */
function availableConcepts() {
  const erased = new Set(live.value?.erasures.map(({ concept }) => concept));
  return serverInfo.value.concepts.map(({ concept }) => concept).filter((concept) => !erased.has(concept));
}

function switchOn(erasure = null) {
  const { model, layers, rankings } = serverInfo.value;
  const concepts = erasure ? [erasure.concept] : availableConcepts();
  const settings = erasure ? settingsOf(erasure, layers) : { ...DEFAULTS, ...tryState.settings };
  const chosen = { concept: tryState.concepts.find((concept) => concepts.includes(concept)) ?? concepts[0], seconds: "", enforced: erasure?.enforced ?? false };
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
      erasure ? null : field("Concept", dropDown(concepts.map((concept) => [concept, concept]), chosen.concept, (value) => {
        chosen.concept = value;
      })),
      settingsControls(settings, { model, layers, rankings }, () => {}),
      field("Ends", dropDown(times, chosen.seconds, (value) => {
        chosen.seconds = value;
      })),
      el("div", { class: "tickbox" }, enforced, el("label", { for: enforced.id }, "Enforced: erase it from every request")),
      reason.element,
    ),
    action: erasure ? "Change it for everybody" : "Switch it on for everybody",
    run: async () => {
      const body = { ...asRequest(settings, layers), enforced: enforced.checked, reason: reason.value(), ...(chosen.seconds ? { expires_in: Number(chosen.seconds) } : {}) };
      const { at, named } = conceptPath(chosen.concept);
      updateLive((await call("PUT", path("v1", "erasures", at), { body, query: named, ifMatch: guard.generation })).data);
    },
    refused: onStale(guard, () => chosen.concept),
  });
}

function switchOff(concept) {
  const guard = { generation: live.value?.generation };
  const reason = reasonField();
  confirm({
    title: `Switch ${concept} off`,
    content: el("div", {}, el("p", {}, userText(concept), " is no longer erased from requests that name no erasures."), reason.element),
    action: "Switch it off for everybody",
    danger: true,
    run: async () => {
      const { at, named } = conceptPath(concept);
      updateLive((await call("DELETE", path("v1", "erasures", at), { query: { ...named, reason: reason.value() }, ifMatch: guard.generation })).data);
    },
    refused: onStale(guard, () => concept),
  });
}
