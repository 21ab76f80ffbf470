// Information about the server: its model, the concepts of the active range set, what was fitted, what the key may do.

import { call, path } from "./api.js";
import { model as chosen } from "./model.js";
import { Observable } from "./observable.js";

/**
 * { model, models, concepts, rangeSet, layers, rankings, features, scopes, problem }; null until it is loaded.
 * `models`: names of all models. `layers`: the fitted blocks; [-1], the last one, if they are unknown.
 * `features` of the server and `scopes` of the key: null if unknown. `problem`: why the concepts are unknown.
 */
export const serverInfo = new Observable(null);

const UNKNOWN_MODEL = { id: "", kind: "", family: "", labels: [], layers: null, hidden_size: null, max_tokens: null, dtype: "", device: "" };

/** The models. A key without scope read gets an unknown one. */
async function loadModels(signal) {
  try {
    return (await call("GET", "/v1/models", { query: { model: null }, signal })).data.models;
  } catch (error) {
    if (error.status !== 403) throw error;
    return [UNKNOWN_MODEL];
  }
}

/** Whether the server has a feature; true if unknown. */
export const hasFeature = (feature) => serverInfo.value.features?.includes(feature) ?? true;

/** Whether the key has a scope; true if unknown. */
export function hasScope(scope) {
  const { scopes } = serverInfo.value;
  return scopes === null || scopes.includes(scope) || scopes.includes("admin");
}

/** Disable an element unless the key has a scope. */
export function requireScope(scope, element) {
  if (!hasScope(scope)) {
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
    return { features: null, scopes: error.status === 403 ? ["infer"] : null }; // any key with scope read may read them
  }
}

/** Load it. Throws as `call`; no active range set, or a key without scope read, is no error. */
export async function loadServerInfo(signal) {
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
  serverInfo.value = found;
  return found;
}
