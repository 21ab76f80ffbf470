"""Draws docs/ranges.png, the README's picture, from the demo's own statistics: `make picture` (after `make demo`)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from app.settings import Settings
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.domain.ranges import range_bounds
from range_store.domain.rankings import rank_order
from range_store.embedded.connection import connect
from range_store.storage.store import RangeStore
from workers.demo.demo import NAME, prepare

CONCEPT = "Sports"
COLOURS = {"World": "#4477aa", "Sports": "#ee6677", "Business": "#228833", "SciTech": "#aa8800"}
MERGED = 16
"""Histogram bins drawn as one: a few hundred texts do not fill 512."""


def densities(axes: Axes, inspect: InspectLayer, concepts: tuple[str, ...], neuron: int) -> None:
    edges = inspect.edges[neuron][::MERGED]
    for row, concept in enumerate(concepts):
        counts = inspect.histogram[row, neuron, 1:-1].reshape(-1, MERGED).sum(axis=1)
        axes.stairs(counts / counts.sum(), edges, fill=True, alpha=0.35, color=COLOURS[concept], label=concept)
        axes.stairs(counts / counts.sum(), edges, color=COLOURS[concept], linewidth=1.2)


def draw(range_set: RangeSet, inspect: InspectLayer, layer: int, out: Path) -> None:
    neuron = int(rank_order(range_set.saliency(layer, "selectivity", CONCEPT))[0])
    row = range_set.concept_index(CONCEPT)
    serve = range_set.layer(layer)
    low, high = range_bounds("sigma", 2.5, range_set.counts[row], serve.mean[row, neuron], serve.std[row, neuron])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    for axes in (left, right):
        densities(axes, inspect, range_set.concepts, neuron)
        drawn = inspect.histogram[:, neuron, 1:-1].sum(axis=0)
        filled = np.flatnonzero(drawn)
        edges = inspect.edges[neuron]
        left_end, right_end = min(edges[filled[0]], float(low)), max(edges[filled[-1] + 1], float(high))
        margin = 0.05 * (right_end - left_end)
        axes.set_xlim(left_end - margin, right_end + margin)
        axes.set_xlabel(f"value of neuron {neuron} of block {layer}")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("share of the concept's texts")
    left.axvspan(*left.get_xlim(), color="black", alpha=0.12, zorder=0)
    left.set_title("neuron masking: zeroed whatever its value,\nand every concept loses it", fontsize=10)
    right.axvspan(float(low), float(high), color=COLOURS[CONCEPT], alpha=0.15, zorder=0)
    right.set_title(
        f"range masking: zeroed only inside {CONCEPT}' range (mean ± 2.5 std),\nwhere the others seldom are",
        fontsize=10,
    )
    right.legend(frameon=False, loc="upper right")
    figure.savefig(out, dpi=110)


def main() -> None:
    settings = Settings()
    with connect(None, settings.data_dir / "demo" / "redis") as client:
        store = RangeStore(client, NAME)
        demo = prepare(settings.data_dir / "demo", store, lambda *now: None)
        layer = demo.model.identity.n_layers - 1
        draw(
            store.range_sets.read(demo.range_set),
            store.range_sets.read_inspect(demo.range_set, layer),
            layer,
            Path(__file__).parent / "ranges.png",
        )


if __name__ == "__main__":
    main()
