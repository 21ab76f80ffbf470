// Neurons: a concept's neurons by rank, one neuron's densities and ranges, and how far concepts share their neurons.

import { call, isAbort, ofConcept, path } from "./api.js";
import { chart, densities, heatMap } from "./charts.js";
import { button, choice, el, field, fill, freshId, quoted, refill, table } from "./elements.js";
import { allowed, facts, may } from "./facts.js";
import { Latest } from "./latest.js";
import { empty, failed, loading } from "./notices.js";
import { count, percent, range, value } from "./numbers.js";
import { RANKINGS, slider } from "./settings.js";
import { keep } from "./state.js";
import { tried } from "./try.js";

const PAGE = 12;
const DRAWN = 14; // concepts that a chart draws unless more are chosen

export async function showNeurons(part, params, signal) {
  const { concepts, layers, rankings, problem } = facts.value;
  part.append(el("h1", { class: "unseen" }, "Neurons"));
  if (!concepts.length) {
    part.append(problem && problem.code !== "no_range_set" ? failed(problem) : empty("No range set is active", "Neurons have ranges once texts are fitted: neuronlens fit --model … --data … --activate"));
    return;
  }
  const names = concepts.map(({ concept }) => concept);
  const wanted = Number(params.get("layer") ?? NaN);
  const number = (name, normal) => (/^\d+(\.\d+)?$/.test(params.get(name) ?? "") ? Number(params.get(name)) : normal);
  const chosen = {
    concept: [params.get("concept"), tried.concepts[0]].find((name) => names.includes(name)) ?? names[0],
    layer: layers.includes(wanted) ? wanted : layers.at(-1),
    ranking: rankings.includes(params.get("ranking")) ? params.get("ranking") : rankings[0],
    tau: number("tau", 2.5),
    neuron: number("neuron", null),
  };
  if (params.get("text")) tried.text = params.get("text");
  const ranked = el("div", {}, loading("neurons"));
  const shown = el("div", { class: "card", role: "region", "aria-label": "One neuron" });
  const shared = el("div", { class: "card", role: "region", "aria-label": "Overlap" });
  const density = chart(signal);
  const overlap = chart(signal);
  const latest = { table: new Latest(), neuron: new Latest(), overlap: new Latest() };
  signal.addEventListener("abort", () => Object.values(latest).forEach((each) => each.stop()));
  let cursors = [null]; // of the pages up to the one that is shown
  let others = null; // concepts that are drawn beside the chosen one, once somebody chose them

  const remember = () => keep("neurons", { ...chosen, tau: chosen.tau === 2.5 ? null : chosen.tau, text: tried.text });
  const guarded = (place, again, work) => async (stop) => {
    try {
      await work(stop);
    } catch (error) {
      if (isAbort(error) || signal.aborted) return;
      fill(place, failed(error, again));
    }
  };

  const read = (which, moving, ask) => (moving ? latest[which].soon(ask) : latest[which].now(ask));

  const readTable = (moving = false) => read("table", moving, guarded(ranked, () => readTable(), async (stop) => {
    const { concept, layer, ranking, tau } = chosen;
    const { at, named } = ofConcept(concept);
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
    refill(
      ranked,
      table(
        `Neurons of ${page.concept} by rank`,
        ["Rank", "Neuron", "Saliency", `Range, ±${page.tau} σ`, "Overlaps most"],
        page.neurons.map((each) => {
          const [other, share] = Object.entries(each.overlap).sort((a, b) => b[1] - a[1])[0] ?? [null, 0];
          return [
            each.rank + 1,
            button(`${each.neuron}`, () => select(each.neuron), { class: "pick", "aria-label": `Show neuron ${each.neuron}`, "aria-pressed": String(each.neuron === chosen.neuron), "data-neuron": each.neuron }),
            value(each.saliency),
            range(each.low, each.high),
            other === null || share === 0 ? "none" : [`${percent(share, 0)} `, quoted(other, { class: "quiet" })],
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
      refill(
        shown,
        el("h2", {}, `Neuron ${neuron} of block ${layer}`),
        el("p", { class: "quiet" }, `How the texts of ${names.length > DRAWN ? "some concepts" : "each concept"} spread over its values, and below, ${names.length > DRAWN ? "their ranges" : "each concept’s range"} (mean ± ${tau} σ).`),
        density.place,
        names.length > DRAWN ? drawnChoice(names, concept, drawn(), (picked) => {
          others = picked;
          draw();
        }) : null,
        at === null ? null : el("p", {}, "The text under Try has the value ", el("strong", {}, value(at)), " here, ", ...within(data, at), "."),
        el(
          "details",
          {},
          el("summary", {}, "The same as numbers"),
          table(
            `Statistics of neuron ${neuron}`,
            ["Concept", "Texts", "Mean", "Standard deviation", "Range", "Skewness", "Kurtosis", "Rank"],
            data.concepts.map((each) => [quoted(each.concept), each.texts.toLocaleString("en"), value(each.mean), value(each.std), range(each.low, each.high), value(each.skewness, 2), value(each.kurtosis, 2), (each.rank[chosen.ranking] ?? 0) + 1]),
          ),
        ),
      );
      await draw();
    }));
  };

  const readOverlap = () => read("overlap", false, guarded(shared, () => readOverlap(), async (stop) => {
    const { data } = await call("GET", "/v1/overlap", { query: { layer: chosen.layer, ranking: chosen.ranking }, signal: stop });
    refill(
      shared,
      el("h2", {}, "Shared neurons"),
      el("p", { class: "quiet" }, `Which part of a concept’s ${data.neurons} most salient neurons (${percent(data.top_fraction, 0)}) is salient for another one too. By chance it would be ${percent(data.chance, 0)}; ${data.shared_by_all.length} are salient for all.`),
      overlap.place,
      el(
        "details",
        {},
        el("summary", {}, "The same as numbers"),
        table("Shared salient neurons", ["of ↓, also of →", ...data.concepts], data.share.map((row, at) => [quoted(data.concepts[at]), ...row.map((each) => percent(each, 0))])),
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
          field("Concept", choice(names.map((name) => [name, name]), chosen.concept, (name) => set("concept", name))),
          field("Block", choice(layers.map((layer) => [layer, layer]), chosen.layer, (layer) => set("layer", layer))),
          field("Ranking", choice(rankings.map((name) => [name, RANKINGS[name] ?? name]), chosen.ranking, (name) => set("ranking", name))),
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

/** Boxes to choose by which concepts a chart draws; the one that the page is about always is. */
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
    return el("span", { class: "tick" }, input, el("label", { for: id, class: "chip", title: name }, quoted(name)));
  };
  return el("details", { "data-key": "drawn" }, summary, el("fieldset", { class: "chips", "aria-label": "Concepts that are drawn" }, names.map(box)));
}

/** Which ranges a value lies in, in words. */
function within(data, at) {
  const inside = data.concepts.filter(({ low, high }) => low !== null && at >= low && at <= high);
  if (!inside.length) return ["outside of every concept’s range"];
  return ["inside the range of ", ...inside.flatMap(({ concept }, place) => [place ? ", " : "", quoted(concept)])];
}

let known = { of: "", value: null }; // a moved slider does not change it

/** The value that the text under Try has at a neuron; null without a text, or where the server does not tell. */
async function valueOfText(layer, neuron, signal) {
  if (!may("activations") || !allowed("infer") || !tried.text.trim()) return null;
  const body = { inputs: tried.text, layer, neurons: [neuron] };
  const of = JSON.stringify(body);
  if (known.of === of) return known.value;
  try {
    const { data } = await call("POST", "/v1/activations", { body, signal });
    known = { of, value: data.results[0].values[0] };
    return known.value;
  } catch (error) {
    if (!error.status) throw error;
    return null; // a text without tokens, or an enforced erasure that it would show
  }
}
