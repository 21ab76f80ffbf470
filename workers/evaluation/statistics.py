"""Shapes of activations per concept (paper Table 2, Figures 3-5), from a range set's moments and histograms.

C: concepts, D: neurons, B: histogram bins.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from range_store.domain.erasure import Ranking
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.domain.ranges import overlap_coefficient, range_bounds
from range_store.domain.rankings import rank_order, top_neurons
from workers.fitting.moments import Moments

Floats = npt.NDArray[np.float64]
GAUSSIAN_DISTANCE = 0.1
"""KS distance below which the paper calls a neuron Gaussian."""
MIN_BINS = 512
"""KS distances are uncertain with fewer bins."""
POOLED = "all concepts together"


@dataclass(frozen=True)
class Shape:
    """One row of Table 2: means over the neurons of one concept's texts, or of all texts pooled.

    `kurtosis` is m4/m2², 3 for a Gaussian. A histogram gives the distribution only at the edges of its bins, so the
    share of neurons with a KS distance below 0.1 from a Gaussian lies between `gaussian_surely` and
    `gaussian_possibly`, and `ks_error` is the mean width of that uncertainty. `left_out`: constant or non-finite
    neurons.
    """

    concept: str
    texts: int
    neurons: int
    left_out: int
    skewness: float
    absolute_skewness: float
    kurtosis: float
    ks: float
    ks_error: float
    gaussian_surely: float
    gaussian_possibly: float


def shapes(range_set: RangeSet, layer: int, inspect: InspectLayer) -> list[Shape]:
    """Table 2 for one layer: a row per concept, and one for the texts of all concepts."""
    serve = range_set.layer(layer)
    moments = [
        Moments.from_central(int(n), serve.mean[c], serve.std[c], inspect.m3[c], inspect.m4[c])
        for c, n in enumerate(range_set.counts)
    ]
    everything = (POOLED, reduce(Moments.merge, moments), inspect.histogram.sum(axis=0, dtype=np.int64))
    groups = [*zip(range_set.concepts, moments, inspect.histogram, strict=True), everything]
    return [_shape(concept, own, inspect.edges, histogram) for concept, own, histogram in groups]


def _shape(concept: str, moments: Moments, edges: Floats, histogram: npt.NDArray[np.integer]) -> Shape:
    mean, std = moments.mean, moments.std
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness, kurtosis = moments.central(3) / std**3, moments.central(4) / std**4
    # the deviation of a constant neuron may be a tiny number instead of 0
    usable = np.isfinite(skewness) & np.isfinite(kurtosis) & (std > 1e-12 * np.abs(mean))
    low, high = ks_distance(mean[usable], std[usable], edges[usable], histogram[usable])

    def average(values: npt.NDArray[Any]) -> float:
        return float(values.mean()) if len(values) else float("nan")

    return Shape(
        concept=concept,
        texts=moments.count,
        neurons=int(usable.sum()),
        left_out=int((~usable).sum()),
        skewness=average(skewness[usable]),
        absolute_skewness=average(np.abs(skewness[usable])),
        kurtosis=average(kurtosis[usable]),
        ks=average(low),
        ks_error=average(high - low),
        gaussian_surely=average(high < GAUSSIAN_DISTANCE),
        gaussian_possibly=average(low < GAUSSIAN_DISTANCE),
    )


def ks_distance(mean: Floats, std: Floats, edges: Floats, histogram: npt.NDArray[np.integer]) -> tuple[Floats, Floats]:
    """Lower and upper bounds, [D] each, of the KS distance between z-scored values and a standard Gaussian.

    The lower bound is the distance at the edges. Between two edges both distribution functions only rise, so the
    distance there is at most that between one function at one edge and the other function at the other edge.

    Args:
        edges: [D, B + 1]; histogram: [D, B + 2], its first and last column beyond the edges.
    """
    if not len(mean):
        return np.zeros(0), np.zeros(0)
    counts = histogram.astype(np.float64)
    at_edges = (counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True))[:, :-1]  # share of values below each edge
    normal = ndtr((edges - mean[:, None]) / std[:, None])
    lower = np.abs(at_edges - normal).max(axis=1)
    # both functions at the ends of all columns; the first and last column reach to infinity
    zero, one = np.zeros((len(mean), 1)), np.ones((len(mean), 1))
    empirical, gaussian = np.hstack([zero, at_edges, one]), np.hstack([zero, normal, one])
    upper = np.maximum(empirical[:, 1:] - gaussian[:, :-1], gaussian[:, 1:] - empirical[:, :-1]).max(axis=1)
    return lower, np.maximum(lower, upper)


@dataclass(frozen=True)
class RangeOverlap:
    """Mean overlap coefficient of two concepts' ranges at the top and at the bottom neurons of a ranking."""

    ranking: Ranking
    neurons: int
    tau: float
    top: float
    bottom: float


def range_overlap(
    range_set: RangeSet, layer: int, ranking: Ranking, top_fraction: float = 0.05, tau: float = 2.5
) -> RangeOverlap:
    """Overlap of every two concepts' ranges at the k highest and the k lowest neurons of the first one's ranking."""
    low, high = _bounds(range_set, layer, tau)
    at_top: list[float] = []
    at_bottom: list[float] = []
    k = 0
    for c, concept in enumerate(range_set.concepts):
        ranked = rank_order(range_set.saliency(layer, ranking, concept))
        k = max(1, int(len(ranked) * top_fraction))
        for other in range(len(range_set.concepts)):
            if other != c:
                shared = overlap_coefficient(low[c], high[c], low[other], high[other])
                at_top.append(float(shared[ranked[:k]].mean()))
                at_bottom.append(float(shared[ranked[-k:]].mean()))
    if not at_top:
        return RangeOverlap(ranking, k, tau, float("nan"), float("nan"))
    return RangeOverlap(ranking, k, tau, float(np.mean(at_top)), float(np.mean(at_bottom)))


@dataclass(frozen=True)
class SelectedNeuron:
    """A neuron to draw, and why."""

    neuron: int
    reason: str


def neurons_by_rank(range_set: RangeSet, layer: int, ranking: Ranking, concept: str) -> list[SelectedNeuron]:
    """Two top, two middle and two bottom neurons of a concept's ranking (paper Figure 3)."""
    ranked = rank_order(range_set.saliency(layer, ranking, concept)).tolist()
    middle = len(ranked) // 2
    groups = {"top": ranked[:2], "middle": ranked[middle : middle + 2], "bottom": ranked[-2:]}
    return [SelectedNeuron(neuron, reason) for reason, neurons in groups.items() for neuron in neurons]


def shared_neurons(
    range_set: RangeSet, layer: int, ranking: Ranking, top_fraction: float = 0.05, tau: float = 2.5
) -> list[SelectedNeuron]:
    """Of neurons in every concept's top 5 %, two whose ranges overlap least and two that overlap most (Figures 4, 5).

    If no neuron is in every concept's top set, those in the largest number of top sets are considered.
    """
    low, high = _bounds(range_set, layer, tau)
    votes = np.zeros(low.shape[1], dtype=np.int64)
    for concept in range_set.concepts:
        votes[top_neurons(range_set.saliency(layer, ranking, concept), top_fraction)] += 1
    shared = np.flatnonzero(votes == votes.max()) if votes.any() else np.zeros(0, dtype=np.int64)
    n = len(range_set.concepts)
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n)]
    if not pairs or not len(shared):
        return []
    overlap = np.mean([overlap_coefficient(low[a], high[a], low[b], high[b]) for a, b in pairs], axis=0)[shared]
    by_overlap = shared[np.argsort(overlap, kind="stable")].tolist()
    reason = f"in the top {top_fraction:.0%} of {votes.max()} of {n} concepts"
    separable = [SelectedNeuron(neuron, f"separable, {reason}") for neuron in by_overlap[:2]]
    return separable + [SelectedNeuron(neuron, f"overlapping, {reason}") for neuron in by_overlap[2:][-2:]]


def _bounds(range_set: RangeSet, layer: int, tau: float) -> tuple[Floats, Floats]:
    serve = range_set.layer(layer)
    return range_bounds("sigma", tau, range_set.counts[:, None], serve.mean, serve.std)
