// What the page knows about the server: its model, the concepts of the active range set, what was fitted.

import { call, path } from "./api.js";
import { Watched } from "./watched.js";

/** { model, concepts, rangeSet, layers, rankings }; null until they are known. `concepts` is null if they cannot be read. */
export const facts = new Watched(null);

const UNTOLD = { id: "", kind: "", family: "", labels: [], layers: 1, hidden_size: null, max_tokens: null, dtype: "", device: "" };

/** The model; a key that may classify but not look is told nothing. */
async function loadModel(signal) {
  try {
    return (await call("GET", "/v1/models", { signal })).data.models[0];
  } catch (error) {
    if (error.status !== 403) throw error;
    return UNTOLD;
  }
}

/** Read them. Throws what calls throw; that no range set is active, or that the key may not look, is no error. */
export async function loadFacts(signal) {
  const model = await loadModel(signal);
  const found = { model, concepts: [], rangeSet: null, layers: [...Array(model.layers).keys()], rankings: ["max"], problem: null };
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
