"""Sections of the report that need only the range set: Figure 2, Table 2 and Figures 3-5 of the paper."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from range_store.domain.erasure import Ranking
from range_store.domain.inspection import salient_overlap
from range_store.domain.range_set import InspectLayer, RangeSet
from workers.evaluation import figures
from workers.evaluation.html import Section, figure, folded, shaded, table
from workers.evaluation.statistics import MIN_BINS, SelectedNeuron, neurons_by_rank, shapes, shared_neurons

OVERLAP_FRACTION = 0.3
MAX_DRAWN_CONCEPTS = 4
"""If there are more concepts, densities are drawn for this many of them, selected by a seed."""


def overlap(range_set: RangeSet) -> Section:
    """How many salient neurons two concepts share (Figure 2), at the last fitted layer."""
    last = max(range_set.layers)
    concepts = range_set.concepts
    parts: list[Markup] = []
    averages = []
    for ranking in range_set.provenance.settings.rankings:
        found = salient_overlap(range_set, last, ranking, OVERLAP_FRACTION)
        others = ~np.eye(len(found.share), dtype=np.bool_)
        share = found.share[others].mean() if others.any() else float("nan")
        jaccard = found.jaccard[others].mean() if others.any() else float("nan")
        common = len(found.shared_by_all)
        averages.append(f"{ranking} {share:.2f} (Jaccard {jaccard:.2f}, {common} of {found.k} in every concept's set)")
        hints = [
            [
                f"{one} and {other}: share {found.share[i, j]:.3f}, Jaccard {found.jaccard[i, j]:.3f}"
                for j, other in enumerate(concepts)
            ]
            for i, one in enumerate(concepts)
        ]
        matrix = shaded(concepts, list(zip(concepts, found.share.tolist(), strict=True)), hints)
        parts.append(folded(ranking, matrix) if parts else Markup("<p><b>{}</b></p>{}").format(ranking, matrix))
    return Section(
        f"Figure 2: overlap of the top {OVERLAP_FRACTION:.0%} of two concepts",
        f"On average, two concepts share this part of their salient neurons: {'; '.join(averages)}; by chance "
        f"{found.chance:.2f}.",
        f"Layer {last}; {found.k} of {found.hidden} neurons per concept. Each cell is the share of the row's salient "
        "neurons that are salient for the column's concept, too.",
        parts,
    )


def statistics(range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> Section:
    """Shapes of the activations (Table 2), the last layer first."""
    last = max(inspect)
    layers = sorted(inspect, reverse=True)
    found = [(layer, shape) for layer in layers for shape in shapes(range_set, layer, inspect[layer])]
    lines = [
        (
            layer,
            shape.concept,
            shape.texts,
            *(f"{value:.3f}" for value in (shape.skewness, shape.absolute_skewness, shape.kurtosis)),
            f"{shape.ks:.3f} + {shape.ks_error:.3f}",
            f"{shape.gaussian_surely:.3f} – {shape.gaussian_possibly:.3f}",
            shape.left_out,
        )
        for layer, shape in found
    ]
    own = len(range_set.concepts) + 1
    pooled = found[own - 1][1]
    columns = (
        "layer", "texts of", "texts", "skewness", "|skewness|", "kurtosis", "KS + error", "KS < 0.1", "left out"
    )  # fmt: skip
    is_pooled = [shape.concept == pooled.concept for _, shape in found]
    bins = range_set.provenance.settings.bins
    warning = "" if bins >= MIN_BINS else f" Only {bins} bins: the KS distances are uncertain."
    parts = [table(columns, lines[:own], is_pooled[:own])]
    if len(lines) > own:
        parts.append(folded("other layers", table(columns, lines[own:], is_pooled[own:])))
    return Section(
        "Table 2: shape of the activations",
        f"At layer {last}, pooled, mean skewness is {pooled.skewness:+.3f} (mean absolute "
        f"{pooled.absolute_skewness:.3f}), kurtosis {pooled.kurtosis:.3f} (3 for a Gaussian), and between "
        f"{pooled.gaussian_surely:.0%} and {pooled.gaussian_possibly:.0%} of the neurons have a KS distance "
        "below 0.1.",
        f"Means over neurons; KS distance after z-scoring, from histograms of {bins} bins, with its error bound."
        f"{warning}",
        parts,
    )


def densities(
    range_set: RangeSet, inspect: Mapping[int, InspectLayer], ranking: Ranking, tau: float
) -> Iterator[Section]:
    """Densities of neurons by rank (Figure 3), and of neurons that concepts share (Figures 4, 5)."""
    last = max(inspect)
    drawn = concepts = list(range_set.concepts)
    if len(concepts) > MAX_DRAWN_CONCEPTS:
        indices = np.random.default_rng(0).choice(len(concepts), size=MAX_DRAWN_CONCEPTS, replace=False)
        drawn = [concepts[index] for index in sorted(indices)]
    by_rank = neurons_by_rank(range_set, last, ranking, drawn[0])
    shared = shared_neurons(range_set, last, ranking, tau=tau)
    which = "all concepts" if drawn == concepts else f"{len(drawn)} of {len(concepts)} concepts, drawn with seed 0"
    settings = f"Layer {last}, ranking {ranking}, {which}; dotted lines: bounds at τ {tau:g}."

    def section(title: str, sentence: str, neurons: Sequence[SelectedNeuron]) -> Section:
        drawing = figures.densities(range_set, inspect[last], last, neurons, drawn, tau)
        return Section(title, sentence, settings, [figure(drawing)])

    listed = ", ".join(f"{each.neuron} ({each.reason})" for each in by_rank)
    yield section(
        "Figure 3: densities of top, middle and bottom neurons",
        f"Six neurons by their rank for {drawn[0]}: {listed}.",
        by_rank,
    )
    if shared:
        yield section(
            "Figures 4–5: neurons that concepts share",
            f"The neurons that most concepts share, {shared[0].reason.partition(', ')[2]}: those whose ranges overlap "
            "least, and those whose ranges overlap most.",
            shared,
        )
