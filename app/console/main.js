// The frame of the page: navigation, connection, model, API key, light and dark.

import { connected, isAbort } from "./api.js";
import { dropDown, el } from "./elements.js";
import { showEvaluation } from "./evaluation.js";
import { serverInfo, loadServerInfo } from "./server-info.js";
import { followUpdates, updateMode, live } from "./updates.js";
import { askForKey, key } from "./api-key.js";
import { showLive } from "./live.js";
import { selectModel, model as chosen } from "./model.js";
import { showNeurons } from "./neurons.js";
import { errorCard, loading } from "./notices.js";
import { readAddress } from "./address.js";
import { showTry } from "./try.js";

const VIEWS = { try: ["Try", showTry], live: ["Live", showLive], neurons: ["Neurons", showNeurons], evaluation: ["Evaluation", showEvaluation] };
const main = document.getElementById("main");
let shown = null;

/** Show the view that the address names. Its signal is aborted when the view is left. */
async function show({ focus = false } = {}) {
  const { view } = readAddress();
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
    if (!serverInfo.value) {
      main.replaceChildren(loading("what this server has"));
      await loadServerInfo(signal);
    }
    if (signal.aborted) return;
    const part = document.createElement("div");
    part.className = `view ${name}`;
    main.replaceChildren(part);
    await draw(part, readAddress().params, signal);
    if (focus) main.focus({ preventScroll: true });
  } catch (error) {
    if (isAbort(error) || signal.aborted) return;
    main.replaceChildren(errorCard(error, () => show()));
  }
}

function showConnection() {
  document.getElementById("lost").hidden = connected.value;
  const { value: how } = updateMode;
  const words = !connected.value ? "no connection" : how === "stream" ? "following" : how === "poll" ? "following (polling)" : how === "refused" ? "not following" : "connecting";
  const place = document.getElementById("connection");
  place.textContent = words;
  place.dataset.state = !connected.value ? "lost" : how === "stream" || how === "poll" ? "good" : "waiting";
}

function showModel() {
  const { model, models } = serverInfo.value ?? {};
  const place = document.getElementById("model");
  if (!model) return place.replaceChildren();
  if (models.length > 1) {
    const known = models.includes(chosen || model.id); // the address may name a model that the server does not have
    const options = [...(known ? [] : [["", "choose a model"]]), ...models.map((id) => [id, id])];
    place.replaceChildren(dropDown(options, known ? model.id : "", selectModel, { "aria-label": "Model" }));
  } else place.replaceChildren(el("bdi", {}, model.id));
  if (model.kind) place.title = `${model.family}, ${model.kind}, ${model.layers} blocks of ${model.hidden_size} neurons, ${model.dtype} on ${model.device}`;
}

const dark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);

function showTheme() {
  const button = document.getElementById("theme");
  button.textContent = dark() ? "Switch to light" : "Switch to dark"; 
  document.dispatchEvent(new Event("themechange"));
}

document.getElementById("theme").addEventListener("click", () => {
  const chosen = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = chosen;
  try {
    localStorage.setItem("neuronlens-theme", chosen);
  } catch {
    // storage is disabled: the theme lasts until the page is left
  }
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
document.getElementById("key").addEventListener("click", () => askForKey("This page sends it with its requests.", { insist: true }));

addEventListener("hashchange", () => show({ focus: true }));
key.subscribe(() => {
  serverInfo.value = null;
  document.getElementById("key").dataset.state = key.value ? "set" : "";
  show();
});
connected.subscribe((good) => {
  showConnection();
  if (good && main.querySelector(".problem, .loading")) show(); // other views continue by themselves
});
updateMode.subscribe(showConnection);
serverInfo.subscribe(showModel);
let rangeSet;
live.subscribe((listing) => {
  const before = rangeSet;
  rangeSet = listing.range_set;
  if (before === undefined || before === rangeSet) return;
  serverInfo.value = null; // it has other concepts and blocks
  show();
});
document.getElementById("key").dataset.state = key.value ? "set" : "";
showTheme();
showConnection();
await show();
followUpdates();
