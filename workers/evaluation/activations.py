"""Sections of the report that follow from the ranges alone: Figure 2, Table 2 and Figures 3-5 of the paper."""

from collections.abc import Iterator, Mapping

import numpy as np

from range_store.domain.erasure import Ranking
from range_store.domain.inspection import salient_overlap
from range_store.domain.range_set import InspectLayer, RangeSet
from workers.evaluation import figures
from workers.evaluation.html import Section, figure, folded, shaded, table
from workers.evaluation.statistics import BINS_NEEDED, neurons_by_rank, neurons_of_every_concept, shapes

OVERLAP_FRACTION = 0.3
SHOWN_CONCEPTS = 4
"""Densities of more concepts than these are drawn for so many of them, drawn by a seed."""


def overlap(range_set: RangeSet) -> Section:
    """How far concepts share their salient neurons (Figure 2), at the last fitted layer."""
    last = max(range_set.layers)
    parts: list[str] = []
    said = []
    for ranking in range_set.provenance.settings.rankings:
        found = salient_overlap(range_set, last, ranking, OVERLAP_FRACTION)
        others = ~np.eye(len(found.share), dtype=np.bool_)
        share = found.share[others].mean() if others.any() else float("nan")
        jaccard = found.jaccard[others].mean() if others.any() else float("nan")
        every = len(found.shared_by_all)
        said.append(f"{ranking} {share:.2f} (Jaccard {jaccard:.2f}, {every} of {found.k} in every concept's set)")
        concepts = range_set.concepts
        hints = [
            [
                f"{one} and {other}: share {found.share[i, j]:.3f}, Jaccard {found.jaccard[i, j]:.3f}"
                for j, other in enumerate(concepts)
            ]
            for i, one in enumerate(concepts)
        ]
        drawn = shaded(concepts, list(zip(concepts, found.share.tolist(), strict=True)), hints)
        parts.append(f"<p><b>{ranking}</b></p>{drawn}" if not parts else folded(ranking, drawn))
    return Section(
        f"Figure 2: overlap of the top {OVERLAP_FRACTION:.0%} of two concepts",
        f"Two concepts share this part of their salient neurons on average: {'; '.join(said)}; by chance "
        f"{found.chance:.2f}.",
        f"Layer {last}; {found.k} of {found.hidden} neurons per concept. Of each row's concept, the share that is also "
        "salient for the column's.",
        parts,
    )


def statistics(range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> Section:
    """Shapes of the activations (Table 2), layer by layer, the last one first."""
    last = max(inspect)
    rows, lines = [], []
    for layer in sorted(inspect, reverse=True):
        for shape in shapes(range_set, layer, inspect[layer]):
            rows.append(shape)
            lines.append(
                (
                    layer,
                    shape.concept,
                    shape.texts,
                    *(f"{v:.3f}" for v in (shape.skewness, shape.absolute_skewness, shape.kurtosis)),
                    f"{shape.ks:.3f} + {shape.ks_error:.3f}",
                    f"{shape.gaussian_surely:.3f} – {shape.gaussian_possibly:.3f}",
                    shape.left_out,
                )
            )
    own = len(range_set.concepts) + 1
    whole = rows[own - 1]
    columns = (
        "layer", "texts of", "texts", "skewness", "|skewness|", "kurtosis", "KS + error", "KS < 0.1", "left out"
    )  # fmt: skip
    mean = [line[1] == whole.concept for line in lines]
    bins = range_set.provenance.settings.bins
    warned = "" if bins >= BINS_NEEDED else f" Only {bins} bins: the KS distances are uncertain."
    parts = [table(columns, lines[:own], mean[:own])]
    if len(lines) > own:
        parts.append(folded("other layers", table(columns, lines[own:], mean[own:])))
    return Section(
        "Table 2: shape of the activations",
        f"At layer {last}, pooled, mean skewness is {whole.skewness:+.3f} (mean absolute "
        f"{whole.absolute_skewness:.3f}), kurtosis {whole.kurtosis:.3f} (3 for a Gaussian), and between "
        f"{whole.gaussian_surely:.0%} and {whole.gaussian_possibly:.0%} of the neurons have a KS distance "
        "below 0.1.",
        f"Means over neurons; KS distance after z-scoring, from histograms of {bins} bins, with its error bound."
        f"{warned}",
        parts,
    )


def densities(
    range_set: RangeSet, inspect: Mapping[int, InspectLayer], ranking: Ranking, tau: float
) -> Iterator[Section]:
    """Densities of neurons by rank (Figure 3), and of those that every concept shares (Figures 4, 5)."""
    last = max(inspect)
    concepts = list(range_set.concepts)
    shown = concepts
    if len(concepts) > SHOWN_CONCEPTS:
        drawn = np.random.default_rng(0).choice(len(concepts), size=SHOWN_CONCEPTS, replace=False)
        shown = [concepts[index] for index in sorted(drawn)]
    of_layer = inspect[last]
    by_rank = neurons_by_rank(range_set, last, ranking, shown[0])
    shared = neurons_of_every_concept(range_set, last, ranking, tau=tau)
    of = "all concepts" if shown == concepts else f"{len(shown)} of {len(concepts)} concepts, drawn with seed 0"
    settings = f"Layer {last}, ranking {ranking}, {of}; dotted lines: bounds at τ {tau:g}."
    for title, neurons, sentence in (
        (
            "Figure 3: densities of top, middle and bottom neurons",
            by_rank,
            f"Six neurons by their rank for {shown[0]}: "
            f"{', '.join(f'{each.neuron} ({each.why})' for each in by_rank)}.",
        ),
        (
            "Figures 4–5: neurons that concepts share",
            shared,
            f"The neurons that most concepts share, {shared[0].why.partition(', ')[2]}: those whose ranges overlap "
            "least, and those whose ranges overlap most."
            if shared
            else "",
        ),
    ):
        if neurons:
            drawn_figure = figures.densities(range_set, of_layer, last, neurons, shown, tau)
            yield Section(title, sentence, settings, [figure(drawn_figure)])
