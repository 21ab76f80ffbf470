// Charts by plotly, which is loaded from this server when the first chart is drawn.

import { el } from "./elements.js";
import { percent, value } from "./format.js";

// the palette of Okabe and Ito; further lines differ by their dashes
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#007a5a", "#b0478a", "#8a6400", "#3b7fa8", "#4d4d4d"],
  dark: ["#56b4e9", "#ff8c42", "#2fc79a", "#e79bc6", "#f0c14b", "#9ad0ff", "#c8c8c8"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const DRAWN_BINS = 48; // a few hundred texts would not fill 512 bins
const LEGEND = 150; // maximum height in pixels; longer legends scroll

let plotly = null;

function load() {
  plotly ??= new Promise((resolve, reject) => {
    const script = el("script", { src: document.querySelector('meta[name="plotly"]').content });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => {
      plotly = null;
      reject(new Error("The charts could not be loaded."));
    });
    document.head.append(script);
  });
  return plotly;
}

/** A chart. `draw(colours)` returns { data, layout } and is called again when the colours change; `words` describe it. */
export function chart(signal) {
  const place = el("div", { class: "chart", role: "img", "aria-label": "" });
  let current = null;
  const redraw = async () => {
    if (!current) return;
    const Plotly = await load();
    if (signal.aborted || !current) return;
    const { data, layout } = current(theme());
    await Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
  };
  document.addEventListener("themechange", redraw, { signal });
  signal.addEventListener("abort", () => window.Plotly?.purge(place));
  return {
    place,
    show(words, draw) {
      place.setAttribute("aria-label", words);
      current = draw;
      return redraw();
    },
  };
}

/** The page's colours, as plotly wants them. */
function theme() {
  const probe = el("span", {});
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const colours = { ink: colour("ink"), quiet: colour("quiet"), line: colour("line"), card: colour("card") };
  probe.remove();
  const chosen = document.documentElement.dataset.theme;
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return { ...colours, series: dark ? COLOURS.dark : COLOURS.light, narrow: innerWidth < 640 };
}

const axis = (look) => ({ color: look.quiet, gridcolor: look.line, zerolinecolor: look.line, linecolor: look.line, tickfont: { color: look.quiet }, fixedrange: true });

const plain = (look, height) => ({
  height,
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: "system-ui, sans-serif", color: look.ink, size: 13 },
  hoverlabel: { bgcolor: look.card, bordercolor: look.line, font: { color: look.ink } },
  dragmode: false,
});

// plotly interprets some HTML in its texts, so names are escaped
const shown = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const short = (name) => shown(name.length > 18 ? `${name.slice(0, 17)}…` : name);

/** Densities of the concepts that are `drawn` (a list of names) over each other, with their ranges below (the paper's Figures 3–5). */
export function densities(neuron, drawn, textValue) {
  const order = drawn.map((name) => neuron.concepts.find(({ concept }) => concept === name)).filter(Boolean);
  const { edges } = neuron;
  const filled = edges.slice(1).map((_, bin) => neuron.concepts.some(({ histogram }) => histogram.counts[bin] > 0));
  const [start, end] = [filled.indexOf(true), filled.lastIndexOf(true) + 1];
  const step = Math.max(1, Math.ceil((end - start) / DRAWN_BINS));
  return (look) => {
    const data = [];
    order.forEach((each, at) => {
      const index = neuron.concepts.indexOf(each);
      const colour = look.series[index % look.series.length];
      const dash = DASHES[Math.floor(index / look.series.length) % DASHES.length];
      const same = { legendgroup: each.concept };
      if (start >= 0) {
        const x = [];
        const y = [];
        for (let bin = start; bin < end; bin += step) {
          const texts = each.histogram.counts.slice(bin, Math.min(bin + step, end)).reduce((sum, more) => sum + more, 0);
          x.push(edges[bin]);
          y.push(texts / each.texts);
        }
        x.push(edges[end]);
        y.push(0);
        data.push({ ...same, type: "scatter", mode: "lines", name: short(each.concept), x, y, line: { shape: "hv", color: colour, dash, width: at ? 1.5 : 3 }, fill: "tozeroy", fillcolor: translucent(colour), hovertemplate: `${short(each.concept)}: %{y:.1%} of its texts<extra></extra>` });
      }
      if (each.low !== null && each.high !== null) {
        const row = short(each.concept);
        data.push({ ...same, type: "scatter", mode: "lines", showlegend: start < 0, name: row, yaxis: "y2", x: [each.low, each.high], y: [at, at], line: { color: colour, width: 9 }, hovertemplate: `${row}: range %{x:.3f}<extra></extra>` });
        data.push({ ...same, type: "scatter", mode: "markers", showlegend: false, yaxis: "y2", x: [each.mean], y: [at], marker: { color: look.card, size: 7, line: { color: look.ink, width: 1 } }, hovertemplate: `${row}: mean %{x:.3f}<extra></extra>` });
      }
    });
    const shapes = [];
    const annotations = [];
    if (textValue !== null) {
      shapes.push({ type: "line", xref: "x", yref: "paper", x0: textValue, x1: textValue, y0: 0, y1: 1, line: { color: look.ink, width: 2, dash: "dot" } });
      annotations.push({ xref: "x", yref: "paper", x: textValue, y: 1, yanchor: "bottom", text: `the text: ${value(textValue)}`, showarrow: false, font: { color: look.ink } });
    }
    const ends = order.flatMap(({ low, high }) => (low === null || high === null ? [] : [low, high]));
    if (start >= 0) ends.push(edges[start], edges[end]);
    if (textValue !== null) ends.push(textValue);
    const [left, right] = [Math.min(...ends), Math.max(...ends)];
    const margin = 0.03 * (right - left) || 1;
    const [above, below] = [250, 66 + 10 * order.length]; // pixels of the densities, and of the ranges
    const strip = below / (above + below);
    const legend = Math.min(LEGEND, 21 * Math.ceil(order.length / (look.narrow ? 2 : 4)));
    const layout = {
      ...plain(look, 72 + above + below + legend),
      margin: { l: 56, r: 12, t: 28, b: 44 },
      xaxis: { ...axis(look), title: { text: `value of neuron ${neuron.neuron} of block ${neuron.layer}` }, anchor: "y2", range: ends.length ? [left - margin, right + margin] : undefined },
      yaxis: { ...axis(look), title: { text: "share of the texts" }, domain: [strip + 0.04, 1], tickformat: ".0%", rangemode: "tozero" },
      yaxis2: { ...axis(look), domain: [0, strip], range: [order.length - 0.4, -0.6], showgrid: false, zeroline: false, tickvals: order.map((_, at) => at), ticktext: order.map(() => ""), title: { text: "ranges" } },
      legend: { orientation: "h", y: 1.06, yanchor: "bottom", maxheight: LEGEND, tracegroupgap: 0, font: { color: look.ink } },
      shapes,
      annotations,
      hovermode: "closest",
    };
    return { data, layout };
  };
}

function translucent(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, 0.13)`;
}

/** How far concepts share their salient neurons, as a heat map (the paper's Figure 2). */
export function heatMap({ concepts, share }) {
  return (look) => {
    const names = concepts.map((name, at) => (concepts.length <= 30 ? short(name) : `${at + 1}`));
    const written = concepts.length <= 10;
    const marked = concepts.map((_, at) => at).filter((at) => concepts.length <= 30 || at % 5 === 4); // more labels would overlap
    return {
      data: [
        {
          type: "heatmap",
          x: concepts.map((_, at) => at),
          y: concepts.map((_, at) => at),
          z: share,
          zmin: 0,
          zmax: 1,
          colorscale: "Cividis",
          xgap: 1,
          ygap: 1,
          text: share.map((row) => row.map((each) => percent(each, 0))),
          texttemplate: written ? "%{text}" : "",
          customdata: share.map((row, from) => row.map((_, to) => `${short(concepts[from])} → ${short(concepts[to])}`)),
          hovertemplate: "%{customdata}: %{text}<extra></extra>",
          colorbar: { tickformat: ".0%", outlinewidth: 0, tickfont: { color: look.quiet }, thickness: 12 },
        },
      ],
      layout: {
        ...plain(look, Math.max(300, Math.min(140 + 34 * Math.min(concepts.length, 20), look.narrow ? 420 : Infinity))),
        margin: { l: 8, r: 8, t: 8, b: 8 },
        xaxis: { ...axis(look), tickvals: marked, ticktext: marked.map((at) => names[at]), automargin: true, showgrid: false, zeroline: false },
        yaxis: { ...axis(look), tickvals: marked, ticktext: marked.map((at) => names[at]), automargin: true, autorange: "reversed", showgrid: false, zeroline: false },
      },
    };
  };
}
