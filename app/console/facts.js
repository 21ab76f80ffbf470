// What the page knows about the server: its model, the concepts of the active range set, what was fitted.

import { call, path } from "./api.js";
import { model as chosen } from "./model.js";
import { Watched } from "./watched.js";

/**
 * { model, models, concepts, rangeSet, layers, rankings, features, scopes, problem }; null until they are known.
 * `models`: the names of all that the server has. `layers`: the fitted blocks; [-1], the last one, where none is told.
 * `features`: what the server can do, by name; null if it does not say. `scopes`: those of the key; null if it does not
 * say. `problem`: why concepts are not known.
 */
export const facts = new Watched(null);

const UNTOLD = { id: "", kind: "", family: "", labels: [], layers: null, hidden_size: null, max_tokens: null, dtype: "", device: "" };

/** The models; a key that may classify but not look is told nothing. */
async function loadModels(signal) {
  try {
    return (await call("GET", "/v1/models", { query: { model: null }, signal })).data.models;
  } catch (error) {
    if (error.status !== 403) throw error;
    return [UNTOLD];
  }
}

/** Whether the server has a feature; one that does not say may have it. */
export const may = (feature) => facts.value.features?.includes(feature) ?? true;

/** Whether the key has a scope; where the server does not say, it may have. */
export function allowed(scope) {
  const { scopes } = facts.value;
  return scopes === null || scopes.includes(scope) || scopes.includes("admin");
}

/** An element that is disabled unless the key has a scope. */
export function needing(scope, element) {
  if (!allowed(scope)) {
    element.disabled = true;
    element.title = `Needs a key with scope ${scope}`;
  }
  return element;
}

async function loadCapabilities(signal) {
  try {
    const { features, scopes } = (await call("GET", "/v1/capabilities", { signal })).data;
    return { features, scopes };
  } catch (error) {
    if (!error.status) throw error;
    return { features: null, scopes: error.status === 403 ? ["infer"] : null }; // whoever may look may read them
  }
}

/** Read them. Throws what calls throw; that no range set is active, or that the key may not look, is no error. */
export async function loadFacts(signal) {
  const models = await loadModels(signal);
  const model = models.find(({ id }) => id === chosen) ?? models[0];
  const found = { model, models: models.map(({ id }) => id), concepts: [], rangeSet: null, layers: model.layers === null ? [-1] : [...Array(model.layers).keys()], rankings: ["max"], problem: null, ...(await loadCapabilities(signal)) };
  try {
    const { data } = await call("GET", "/v1/concepts", { signal });
    found.concepts = data.concepts;
    found.rangeSet = data.range_set;
    const { data: published } = await call("GET", path("v1", "range-sets", data.range_set), { signal });
    found.layers = published.provenance.settings.layers;
    found.rankings = published.provenance.settings.rankings;
  } catch (error) {
    if (!error.status) throw error;
    found.problem = error;
  }
  facts.value = found;
  return found;
}
