// The frame of the page: which part is shown, whether the server answers, the key, light and dark.

import { connected, isAbort } from "./api.js";
import { choice, el } from "./elements.js";
import { showEvaluation } from "./evaluation.js";
import { facts, loadFacts } from "./facts.js";
import { follow, following, live } from "./follow.js";
import { askForKey, key } from "./key.js";
import { showLive } from "./live.js";
import { choose, model as chosen } from "./model.js";
import { showNeurons } from "./neurons.js";
import { failed, loading } from "./notices.js";
import { read } from "./state.js";
import { showTry } from "./try.js";

const VIEWS = { try: ["Try", showTry], live: ["Live", showLive], neurons: ["Neurons", showNeurons], evaluation: ["Evaluation", showEvaluation] };
const main = document.getElementById("main");
let shown = null;

/** Show the part that the address names. Each gets a signal that ends when it is left. */
async function show({ focus = false } = {}) {
  const { view } = read();
  const name = Object.hasOwn(VIEWS, view) ? view : "try";
  const [title, draw] = VIEWS[name];
  if (view !== name) history.replaceState(null, "", `#/${name}`);
  shown?.abort();
  shown = new AbortController();
  const { signal } = shown;
  document.title = `${title} · NeuronLens`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    if (!facts.value) {
      main.replaceChildren(loading("what this server has"));
      await loadFacts(signal);
    }
    if (signal.aborted) return;
    const part = document.createElement("div");
    part.className = `view ${name}`;
    main.replaceChildren(part);
    await draw(part, read().params, signal);
    if (focus) main.focus({ preventScroll: true });
  } catch (error) {
    if (isAbort(error) || signal.aborted) return;
    main.replaceChildren(failed(error, () => show()));
  }
}

function showConnection() {
  document.getElementById("lost").hidden = connected.value;
  const { value: how } = following;
  const words = !connected.value ? "no connection" : how === "stream" ? "following" : how === "poll" ? "following (asking)" : how === "refused" ? "not following" : "connecting";
  const place = document.getElementById("connection");
  place.textContent = words;
  place.dataset.state = !connected.value ? "lost" : how === "stream" || how === "poll" ? "good" : "waiting";
}

function showModel() {
  const { model, models } = facts.value ?? {};
  const place = document.getElementById("model");
  if (!model) return place.replaceChildren();
  if (models.length > 1) {
    const known = models.includes(chosen || model.id); // else the address names one that the server has not
    const options = [...(known ? [] : [["", "choose a model"]]), ...models.map((id) => [id, id])];
    place.replaceChildren(choice(options, known ? model.id : "", choose, { "aria-label": "Model" }));
  } else place.replaceChildren(el("bdi", {}, model.id));
  if (model.kind) place.title = `${model.family}, ${model.kind}, ${model.layers} blocks of ${model.hidden_size} neurons, ${model.dtype} on ${model.device}`;
}

const dark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);

function showTheme() {
  const button = document.getElementById("theme");
  button.textContent = dark() ? "Switch to light" : "Switch to dark"; // what it does, not what is
  document.dispatchEvent(new Event("themechange"));
}

document.getElementById("theme").addEventListener("click", () => {
  const chosen = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  try {
    localStorage.setItem("neuronlens-theme", chosen);
  } catch {
    // it lasts until the page is left, then
  }
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
document.getElementById("key").addEventListener("click", () => askForKey("Calls of this page are made with it.", { insist: true }));

addEventListener("hashchange", () => show({ focus: true }));
key.watch(() => {
  facts.value = null;
  document.getElementById("key").dataset.state = key.value ? "set" : "";
  show();
});
connected.watch((good) => {
  showConnection();
  if (good && main.querySelector(".problem, .loading")) show(); // else what is there goes on by itself
});
following.watch(showConnection);
facts.watch(showModel);
let rangeSet;
live.watch((listing) => {
  const before = rangeSet;
  rangeSet = listing.range_set;
  if (before === undefined || before === rangeSet) return;
  facts.value = null; // other concepts, other layers
  show();
});
document.getElementById("key").dataset.state = key.value ? "set" : "";
showTheme();
showConnection();
await show();
follow();
