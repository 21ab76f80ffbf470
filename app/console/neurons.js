// The page Neurons: a concept's neurons by rank, one neuron's densities and ranges, and the neurons that concepts share.

import { call, isAbort, conceptPath, path } from "./api.js";
import { chart, densities, heatMap } from "./charts.js";
import { button, dropDown, el, field, fill, freshId, userText, refresh, table } from "./elements.js";
import { hasScope, serverInfo, hasFeature } from "./server-info.js";
import { LatestCall } from "./latest-call.js";
import { empty, errorCard, loading } from "./notices.js";
import { count, percent, range, value } from "./format.js";
import { RANKINGS, slider } from "./erasure-settings.js";
import { setAddress } from "./address.js";
import { tryState } from "./try.js";

const PAGE = 12;
const DRAWN = 14; // concepts in a chart, unless others are chosen

export async function showNeurons(part, params, signal) {
  const { concepts, layers, rankings, problem } = serverInfo.value;
  part.append(el("h1", { class: "unseen" }, "Neurons"));
  if (!concepts.length) {
    part.append(problem && problem.code !== "no_range_set" ? errorCard(problem) : empty("No range set is active", "Neurons have ranges once texts are fitted: neuronlens fit --model … --data … --activate"));
    return;
  }
  const names = concepts.map(({ concept }) => concept);
  const wanted = Number(params.get("layer") ?? NaN);
  const number = (name, normal) => (/^\d+(\.\d+)?$/.test(params.get(name) ?? "") ? Number(params.get(name)) : normal);
  const chosen = {
    concept: [params.get("concept"), tryState.concepts[0]].find((name) => names.includes(name)) ?? names[0],
    layer: layers.includes(wanted) ? wanted : layers.at(-1),
    ranking: rankings.includes(params.get("ranking")) ? params.get("ranking") : rankings[0],
    tau: number("tau", 2.5),
    neuron: number("neuron", null),
  };
  if (params.get("text")) tryState.text = params.get("text");
  const ranked = el("div", {}, loading("neurons"));
  const shown = el("div", { class: "card", role: "region", "aria-label": "One neuron" });
  const shared = el("div", { class: "card", role: "region", "aria-label": "Overlap" });
  const density = chart(signal);
  const overlap = chart(signal);
  const latest = { table: new LatestCall(), neuron: new LatestCall(), overlap: new LatestCall() };
  signal.addEventListener("abort", () => Object.values(latest).forEach((each) => each.cancel()));
  let cursors = [null]; // of the pages up to the current one
  let others = null; // concepts in the chart beside the chosen one, once the user has chosen them

  const remember = () => setAddress("neurons", { ...chosen, tau: chosen.tau === 2.5 ? null : chosen.tau, text: tryState.text });
  const guarded = (place, again, work) => async (stop) => {
    try {
      await work(stop);
    } catch (error) {
      if (isAbort(error) || signal.aborted) return;
      fill(place, errorCard(error, again));
    }
  };

  const read = (which, moving, ask) => (moving ? latest[which].schedule(ask) : latest[which].runNow(ask));

  const readTable = (moving = false) => read("table", moving, guarded(ranked, () => readTable(), async (stop) => {
    const { concept, layer, ranking, tau } = chosen;
    const { at, named } = conceptPath(concept);
    const query = { ...named, layer, ranking, tau, limit: PAGE, cursor: cursors.at(-1) };
    let page;
    try {
      page = (await call("GET", path("v1", "concepts", at, "ranges"), { query, signal: stop })).data;
    } catch (error) {
      if (error.code !== "stale_cursor") throw error;
      cursors = [null];
      page = (await call("GET", path("v1", "concepts", at, "ranges"), { query: { ...query, cursor: null }, signal: stop })).data;
    }
    drawTable(page);
    if (chosen.neuron === null && page.neurons.length) select(page.neurons[0].neuron);
  }));

  function drawTable(page) {
    const turn = (to) => {
      cursors = to;
      readTable();
    };
    refresh(
      ranked,
      table(
        `Neurons of ${page.concept} by rank`,
        ["Rank", "Neuron", "Saliency", `Range, ±${page.tau} σ`, "Largest overlap"],
        page.neurons.map((each) => {
          const [other, share] = Object.entries(each.overlap).sort((a, b) => b[1] - a[1])[0] ?? [null, 0];
          return [
            each.rank + 1,
            button(`${each.neuron}`, () => select(each.neuron), { class: "pick", "aria-label": `Show neuron ${each.neuron}`, "aria-pressed": String(each.neuron === chosen.neuron), "data-neuron": each.neuron }),
            value(each.saliency),
            range(each.low, each.high),
            other === null || share === 0 ? "none" : [`${percent(share, 0)} `, userText(other, { class: "quiet" })],
          ];
        }),
        { class: "ranked" },
      ),
      el(
        "div",
        { class: "actions" },
        button("Previous", () => turn(cursors.slice(0, -1)), { disabled: cursors.length === 1 }),
        button("Next", () => turn([...cursors, page.next_cursor]), { disabled: !page.next_cursor }),
      ),
    );
  }

  function select(neuron) {
    chosen.neuron = neuron;
    remember();
    for (const each of ranked.querySelectorAll("[data-neuron]")) each.setAttribute("aria-pressed", String(Number(each.dataset.neuron) === neuron));
    readNeuron();
  }

  const readNeuron = (moving = false) => {
    if (chosen.neuron === null) return;
    read("neuron", moving, guarded(shown, () => readNeuron(), async (stop) => {
      const { layer, neuron, tau, concept } = chosen;
      const [{ data }, at] = await Promise.all([
        call("GET", path("v1", "neurons", layer, neuron), { query: { tau }, signal: stop }),
        valueOfText(layer, neuron, stop),
      ]);
      const ranges = data.concepts.map((each) => `${each.concept}: ${range(each.low, each.high)}`).join("; ");
      const drawn = () => [concept, ...(others ?? names.filter((name) => name !== concept).slice(0, DRAWN - 1)).filter((name) => name !== concept)];
      const draw = () => density.show(`Neuron ${neuron}, ranges: ${ranges}`, densities(data, drawn(), at));
      refresh(
        shown,
        el("h2", {}, `Neuron ${neuron} of block ${layer}`),
        el("p", { class: "quiet" }, `Distribution of the texts of ${names.length > DRAWN ? "some concepts" : "each concept"} over the values of this neuron, and below it the ranges (mean ± ${tau} σ).`),
        density.place,
        names.length > DRAWN ? drawnChoice(names, concept, drawn(), (picked) => {
          others = picked;
          draw();
        }) : null,
        at === null ? null : el("p", {}, "The text of Try has the value ", el("strong", {}, value(at)), " here, ", ...within(data, at), "."),
        el(
          "details",
          {},
          el("summary", {}, "Show as a table"),
          table(
            `Statistics of neuron ${neuron}`,
            ["Concept", "Texts", "Mean", "Standard deviation", "Range", "Skewness", "Kurtosis", "Rank"],
            data.concepts.map((each) => [userText(each.concept), each.texts.toLocaleString("en"), value(each.mean), value(each.std), range(each.low, each.high), value(each.skewness, 2), value(each.kurtosis, 2), (each.rank[chosen.ranking] ?? 0) + 1]),
          ),
        ),
      );
      await draw();
    }));
  };

  const readOverlap = () => read("overlap", false, guarded(shared, () => readOverlap(), async (stop) => {
    const { data } = await call("GET", "/v1/overlap", { query: { layer: chosen.layer, ranking: chosen.ranking }, signal: stop });
    refresh(
      shared,
      el("h2", {}, "Shared neurons"),
      el("p", { class: "quiet" }, `The share of a concept’s ${data.neurons} most salient neurons (${percent(data.top_fraction, 0)}) that are also among another concept’s. By chance it would be ${percent(data.chance, 0)}; all concepts share ${data.shared_by_all.length}.`),
      overlap.place,
      el(
        "details",
        {},
        el("summary", {}, "Show as a table"),
        table("Shared salient neurons", ["share of ↓ that is also of →", ...data.concepts], data.share.map((row, at) => [userText(data.concepts[at]), ...row.map((each) => percent(each, 0))])),
      ),
    );
    await overlap.show(`Heat map of shared neurons of ${data.concepts.length} concepts`, heatMap(data));
  }));

  const again = ({ neuron = null, sharing = true } = {}) => {
    cursors = [null];
    chosen.neuron = neuron;
    remember();
    readTable();
    readNeuron();
    if (sharing) readOverlap();
  };
  const set = (name, text) => {
    chosen[name] = name === "layer" ? Number(text) : text;
    again({ sharing: name !== "concept" });
  };
  part.append(
    el(
      "div",
      { class: "columns" },
      el(
        "section",
        { class: "card", "aria-label": "Neurons by rank" },
        el("h2", {}, "Neurons by rank"),
        el(
          "div",
          { class: "pickers" },
          field("Concept", dropDown(names.map((name) => [name, name]), chosen.concept, (name) => set("concept", name))),
          field("Block", dropDown(layers.map((layer) => [layer, layer]), chosen.layer, (layer) => set("layer", layer))),
          field("Ranking", dropDown(rankings.map((name) => [name, RANKINGS[name] ?? name]), chosen.ranking, (name) => set("ranking", name))),
          slider("τ", 0, 6, 0.1, chosen.tau, (number_) => `${number_.toFixed(1)} σ`, (tau) => {
            chosen.tau = tau;
            remember();
            readTable(true);
            readNeuron(true);
          }),
        ),
        ranked,
      ),
      el("div", { class: "column" }, shown, shared),
    ),
  );
  fill(shown, loading("the neuron"));
  fill(shared, loading("the overlap"));
  again({ neuron: chosen.neuron });
}

/** Checkboxes for the concepts in a chart; the chosen concept is always drawn. */
function drawnChoice(names, first, drawn, changed) {
  const chosen = new Set(drawn);
  const summary = el("summary", { "data-key": "drawn" });
  const say = () => summary.replaceChildren(`Drawn: ${chosen.size} of ${count(names.length, "concept")}`);
  say();
  const box = (name) => {
    const id = freshId("drawn");
    const input = el("input", {
      type: "checkbox",
      id,
      "data-key": `draw ${name}`,
      checked: chosen.has(name),
      disabled: name === first,
      onchange: () => {
        if (input.checked) chosen.add(name);
        else chosen.delete(name);
        say();
        changed(names.filter((each) => chosen.has(each)));
      },
    });
    return el("span", { class: "tick" }, input, el("label", { for: id, class: "chip", title: name }, userText(name)));
  };
  return el("details", { "data-key": "drawn" }, summary, el("fieldset", { class: "chips", "aria-label": "Concepts that are drawn" }, names.map(box)));
}

/** The ranges that contain a value, as text. */
function within(data, at) {
  const inside = data.concepts.filter(({ low, high }) => low !== null && at >= low && at <= high);
  if (!inside.length) return ["outside of every concept’s range"];
  return ["inside the range of ", ...inside.flatMap(({ concept }, place) => [place ? ", " : "", userText(concept)])];
}

let cached = { request: "", value: null }; // so that moving a slider sends no request

/** The value of the text of the page Try at a neuron; null if there is none. */
async function valueOfText(layer, neuron, signal) {
  if (!hasFeature("activations") || !hasScope("infer") || !tryState.text.trim()) return null;
  const body = { inputs: tryState.text, layer, neurons: [neuron] };
  const request = JSON.stringify(body);
  if (cached.request === request) return cached.value;
  try {
    const { data } = await call("POST", "/v1/activations", { body, signal });
    cached = { request, value: data.results[0].values[0] };
    return cached.value;
  } catch (error) {
    if (!error.status) throw error;
    return null; // the text has no tokens, or an enforced erasure hides its values
  }
}
