// Settings of an erasure and their controls, for the page Try and for dialogs.

import { dropDown, el, field, freshId } from "./elements.js";
import { percent } from "./format.js";

/** The defaults of the method (docs/method.md). `layer` is a block from 0, a list of some, or "all"; null: the last fitted one. */
export const DEFAULTS = { method: "range", tau: 2.5, top: 0.3, layer: null, ranking: "max", replacement: "zero", damp: 0.5 };

export const RANKINGS = {
  max: "max: mean of |h|",
  probe: "probe: weights of a linear probe",
  probeless: "probeless: distance to other means",
  probeless_global: "probeless, over all pairs",
  selectivity: "selectivity: distance over spread",
};
const REPLACEMENTS = { zero: "zero", mean: "mean of the other concepts", damp: "part of their value" };

/** The settings in the parameters of an address. An invalid one gets its default. */
export function parseSettings(params) {
  const number = (name, low, high, normal) => {
    const text = params.get(name);
    const value = Number(text);
    return text && Number.isFinite(value) && value >= low && value <= high ? value : normal;
  };
  const oneOf = (name, known) => (Object.hasOwn(known, params.get(name) ?? "") ? params.get(name) : null);
  const layer = params.get("layer");
  return {
    method: params.get("method") === "neuron" ? "neuron" : "range",
    tau: number("tau", 0, 100, DEFAULTS.tau),
    top: number("top", 0.001, 1, DEFAULTS.top),
    layer: layer === "all" ? "all" : /^\d{1,3}$/.test(layer ?? "") ? Number(layer) : null,
    ranking: oneOf("ranking", RANKINGS) ?? DEFAULTS.ranking,
    replacement: oneOf("replacement", REPLACEMENTS) ?? DEFAULTS.replacement,
    damp: number("damp", 0, 1, DEFAULTS.damp),
  };
}

/** The settings that differ from the defaults, for an address. */
export function nonDefault(settings) {
  return Object.fromEntries(
    Object.entries(settings).filter(([name, value]) => name in DEFAULTS && value !== DEFAULTS[name] && (name !== "damp" || settings.replacement === "damp")),
  );
}

/** The settings as JSON of the API. */
export function asRequest(settings, layers) {
  return {
    method: settings.method,
    tau: settings.tau,
    top_fraction: settings.top,
    ranking: settings.ranking,
    layer: settings.layer === "all" ? layers : (settings.layer ?? layers.at(-1) ?? -1),
    replacement: settings.replacement === "damp" ? { damp: settings.damp } : settings.replacement,
  };
}

/** The settings of an erasure in a reply of the API. */
export function settingsOf(erasure, layers) {
  const damped = typeof erasure.replacement === "object";
  return {
    method: erasure.method,
    tau: erasure.tau,
    top: erasure.top_fraction,
    layer: blocksOf(erasure.layers, layers),
    ranking: erasure.ranking,
    replacement: damped ? "damp" : erasure.replacement,
    damp: damped ? erasure.replacement.damp : DEFAULTS.damp,
  };
}

/** The blocks of an erasure, for the controls: the last fitted one, all fitted ones, or a list. */
function blocksOf(chosen, fitted) {
  if (chosen.length === 1) return chosen[0] === fitted.at(-1) ? null : chosen[0];
  return fitted.every((layer) => chosen.includes(layer)) ? "all" : chosen;
}

/** A share in percent with up to two decimals, for shares that are no whole percentage. */
const hundredths = (share) => Number((100 * share).toFixed(2));

/** An erasure's settings in a few words. */
export function describe(erasure) {
  const { method, tau, top_fraction: top, layers, ranking, replacement } = erasure;
  const blocks = layers.length === 1 ? `block ${layers[0]}` : `blocks ${layers.join(", ")}`;
  const what = method === "range" ? `within ±${tau} σ` : "whatever their value";
  const becomes = typeof replacement === "object" ? `damped to ${percent(replacement.damp, 0)}` : `set to ${replacement}`;
  return `${hundredths(top)} % of the neurons (${ranking}) of ${blocks}, ${what}, ${becomes}`;
}

/** Controls that change `settings` in place and then call `changed`. */
export function settingsControls(settings, { model, layers, rankings }, changed) {
  const set = (name, value) => {
    settings[name] = value;
    tau.hidden = settings.method !== "range";
    damp.hidden = settings.replacement !== "damp";
    changed();
  };
  const group = freshId("method");
  const last = layers.at(-1);
  const blocks = layers.map((layer) => [layer, layer === -1 ? "the last one" : layer === last ? `${layer} (last fitted)` : layer]);
  if (layers.length > 1) blocks.push(["all", `all ${layers.length} fitted`]);
  const { layer: given } = settings;
  // keep the blocks of an erasure or a link even if they are not among the fitted ones
  if (Array.isArray(given)) blocks.push([given, given.join(", ")]);
  else if (Number.isInteger(given) && !layers.includes(given)) blocks.push([given, given]);
  const asBlock = (value) => (value === "all" ? value : value === String(given) ? given : Number(value) === last ? null : Number(value));
  if (settings.ranking === DEFAULTS.ranking && !rankings.includes(settings.ranking)) settings.ranking = rankings[0] ?? settings.ranking;
  const ranked = rankings.includes(settings.ranking) ? rankings : [...rankings, settings.ranking];
  const method = el(
    "fieldset",
    { class: "segments" },
    el("legend", {}, "Method"),
    radio("range", "Range", "a neuron is masked only while its value lies in the concept’s range"),
    radio("neuron", "Neuron", "the neurons are masked whatever their value"),
  );
  function radio(value, text, title) {
    const id = freshId("method");
    return [
      el("input", { type: "radio", id, name: group, value, checked: settings.method === value, onchange: () => set("method", value) }),
      el("label", { for: id, title }, text),
    ];
  }
  const tau = slider("τ, half-width of the range", 0, 6, 0.1, settings.tau, (value) => `${value.toFixed(1)} σ`, (value) => set("tau", value));
  const hidden = model?.hidden_size;
  const top = slider(
    "Share of neurons",
    1,
    100,
    1,
    hundredths(settings.top),
    (value) => (hidden ? `${value} % · ${Math.floor((value * hidden) / 100)} of ${hidden}` : `${value} %`),
    (value) => set("top", value / 100),
  );
  const damp = slider("Remaining part", 0, 100, 1, Math.round(100 * settings.damp), (value) => `${value} %`, (value) => set("damp", value / 100));
  tau.hidden = settings.method !== "range";
  damp.hidden = settings.replacement !== "damp";
  return el(
    "div",
    { class: "settings" },
    method,
    tau,
    top,
    field("Block", dropDown(blocks, given ?? last, (value) => set("layer", asBlock(value)))),
    field("Ranking of neurons", dropDown(ranked.map((name) => [name, RANKINGS[name] ?? name]), settings.ranking, (value) => set("ranking", value))),
    field("Masked neurons become", dropDown(Object.entries(REPLACEMENTS), settings.replacement, (value) => set("replacement", value))),
    damp,
  );
}

/** A slider with its value as text. */
export function slider(label, low, high, step, value, words, changed) {
  const output = el("output", {}, words(value));
  const input = el("input", {
    type: "range",
    min: low,
    max: high,
    step,
    "aria-valuetext": words(value),
    oninput: () => {
      const now = Number(input.value);
      output.textContent = words(now);
      input.setAttribute("aria-valuetext", words(now));
      changed(now);
    },
  });
  input.value = value;
  return field(label, input, output);
}
