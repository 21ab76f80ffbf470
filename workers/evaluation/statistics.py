"""Shapes of activations per concept (paper Table 2, Figures 3-5), from a range set's moments and histograms.

C: concepts, D: neurons, B: histogram bins.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from range_store.domain.erasure import Ranking
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.domain.ranges import overlap_coefficient, range_bounds
from range_store.domain.rankings import rank_order, top_neurons

Floats = npt.NDArray[np.float64]
NORMAL_ENOUGH = 0.1
"""KS distance below which the paper calls a neuron Gaussian."""
BINS_NEEDED = 512
POOLED = "all concepts together"


@dataclass(frozen=True, eq=False)
class Moments:
    """Of D neurons: n texts; mean, std (ddof 0), third and fourth central moment, each [D]."""

    n: int
    mean: Floats
    std: Floats
    m3: Floats
    m4: Floats


@dataclass(frozen=True)
class Shape:
    """One row of Table 2: means over the neurons of one concept's texts, or of all texts pooled.

    kurtosis is m4/m2², 3 for a Gaussian. The share of neurons with a KS distance below 0.1 from a Gaussian lies between
    `gaussian_surely` and `gaussian_possibly`: inside a histogram's bin both distributions are known at its ends only.
    `ks_error` is the mean width of that uncertainty. `left_out`: neurons that are constant, or not finite.
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
    """Table 2 for one layer: each concept, and at the end all concepts' texts pooled."""
    serve = range_set.layer(layer)
    parts = [
        Moments(int(n), serve.mean[c], serve.std[c], inspect.m3[c], inspect.m4[c])
        for c, n in enumerate(range_set.counts)
    ]
    rows = [
        _shape(concept, part, inspect.edges, inspect.histogram[c])
        for c, (concept, part) in enumerate(zip(range_set.concepts, parts, strict=True))
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = pooled(whole, part)
    return [*rows, _shape(POOLED, whole, inspect.edges, inspect.histogram.sum(axis=0, dtype=np.int64))]


def pooled(one: Moments, other: Moments) -> Moments:
    """Exact moments of both groups of texts together (Pébay 2008, eqs. 2.1, 3.1)."""
    n = one.n + other.n
    p, q = one.n / n, other.n / n
    gap = other.mean - one.mean
    v1, v2 = one.std**2, other.std**2
    return Moments(
        n,
        one.mean + q * gap,
        np.sqrt(p * v1 + q * v2 + p * q * gap**2),
        p * one.m3 + q * other.m3 + p * q * (p - q) * gap**3 + 3 * p * q * gap * (v2 - v1),
        p * one.m4
        + q * other.m4
        + p * q * (p * p - p * q + q * q) * gap**4
        + 6 * p * q * gap**2 * (p * v2 + q * v1)
        + 4 * p * q * gap * (other.m3 - one.m3),
    )


def _shape(concept: str, moments: Moments, edges: Floats, histogram: npt.NDArray[np.integer]) -> Shape:
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness, kurtosis = moments.m3 / moments.std**3, moments.m4 / moments.std**4
    # beyond rounding: a constant neuron's deviation may be a tiny number instead of 0
    usable = np.isfinite(skewness) & np.isfinite(kurtosis) & (moments.std > 1e-12 * np.abs(moments.mean))
    low, high = ks_distance(moments.mean[usable], moments.std[usable], edges[usable], histogram[usable])
    some = bool(usable.any())
    return Shape(
        concept=concept,
        texts=moments.n,
        neurons=int(usable.sum()),
        left_out=int((~usable).sum()),
        skewness=float(skewness[usable].mean()) if some else float("nan"),
        absolute_skewness=float(np.abs(skewness[usable]).mean()) if some else float("nan"),
        kurtosis=float(kurtosis[usable].mean()) if some else float("nan"),
        ks=float(low.mean()) if some else float("nan"),
        ks_error=float((high - low).mean()) if some else float("nan"),
        gaussian_surely=float((high < NORMAL_ENOUGH).mean()) if some else float("nan"),
        gaussian_possibly=float((low < NORMAL_ENOUGH).mean()) if some else float("nan"),
    )


def ks_distance(mean: Floats, std: Floats, edges: Floats, histogram: npt.NDArray[np.integer]) -> tuple[Floats, Floats]:
    """Bounds [D], [D] of the KS distance between z-scored values and a standard Gaussian.

    The lower bound is the distance at the edges. Between two edges both distributions only rise, so that neither can be
    further from the other than one's value at an end is from the other's at the other end.

    Args:
        edges: [D, B + 1]; histogram: [D, B + 2], its first and last column beyond the edges.
    """
    if not len(mean):
        return np.zeros(0), np.zeros(0)
    counts = histogram.astype(np.float64)
    share = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)  # up to the upper end of each column
    normal = ndtr((edges - mean[:, None]) / std[:, None])
    at_edges = share[:, :-1]  # of values below each edge
    lower = np.abs(at_edges - normal).max(axis=1)
    # the ends of the columns, the first and last of which reach to infinity
    zero, one = np.zeros((len(mean), 1)), np.ones((len(mean), 1))
    empirical, gaussian = np.hstack([zero, at_edges, one]), np.hstack([zero, normal, one])
    upper = np.maximum(empirical[:, 1:] - gaussian[:, :-1], gaussian[:, 1:] - empirical[:, :-1]).max(axis=1)
    return lower, np.maximum(lower, upper)


@dataclass(frozen=True)
class RangeOverlap:
    """Mean overlap coefficient of the ranges of each two concepts, at the top and the bottom neurons of a ranking."""

    ranking: Ranking
    neurons: int
    tau: float
    top: float
    bottom: float


def range_overlap(
    range_set: RangeSet, layer: int, ranking: Ranking, top_fraction: float = 0.05, tau: float = 2.5
) -> RangeOverlap:
    """Of the k highest and the k lowest neurons of each concept's ranking, against every other concept's range."""
    serve = range_set.layer(layer)
    low, high = range_bounds("sigma", tau, range_set.counts[:, None], serve.mean, serve.std)
    at_top: list[float] = []
    at_bottom: list[float] = []
    k = 0
    for c, concept in enumerate(range_set.concepts):
        ranked = rank_order(range_set.saliency(layer, ranking, concept))
        k = max(1, int(len(ranked) * top_fraction))
        others = [other for other in range(len(range_set.concepts)) if other != c]
        for neurons, into in ((ranked[:k], at_top), (ranked[-k:], at_bottom)):
            for other in others:
                shared = overlap_coefficient(low[c], high[c], low[other], high[other])
                into.append(float(shared[neurons].mean()))
    if not at_top:
        return RangeOverlap(ranking, k, tau, float("nan"), float("nan"))
    return RangeOverlap(ranking, k, tau, float(np.mean(at_top)), float(np.mean(at_bottom)))


@dataclass(frozen=True)
class ShownNeuron:
    """A neuron to draw, and why."""

    neuron: int
    why: str


def neurons_by_rank(range_set: RangeSet, layer: int, ranking: Ranking, concept: str) -> list[ShownNeuron]:
    """Two top, two middle and two bottom neurons of a concept's ranking (paper Figure 3)."""
    ranked = rank_order(range_set.saliency(layer, ranking, concept)).tolist()
    middle = len(ranked) // 2
    places = {"top": ranked[:2], "middle": ranked[middle : middle + 2], "bottom": ranked[-2:]}
    return [ShownNeuron(neuron, where) for where, neurons in places.items() for neuron in neurons]


def neurons_of_every_concept(
    range_set: RangeSet, layer: int, ranking: Ranking, top_fraction: float = 0.05, tau: float = 2.5
) -> list[ShownNeuron]:
    """Of neurons in every concept's top 5 %, the two whose ranges overlap least and the two most (Figures 4, 5).

    Where no neuron is in every concept's top set, those that are in the most.
    """
    serve = range_set.layer(layer)
    low, high = range_bounds("sigma", tau, range_set.counts[:, None], serve.mean, serve.std)
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
    of = f"in the top {top_fraction:.0%} of {votes.max()} of {n} concepts"
    separable = [ShownNeuron(neuron, f"separable, {of}") for neuron in by_overlap[:2]]
    overlapping = [ShownNeuron(neuron, f"overlapping, {of}") for neuron in by_overlap[2:][-2:]]
    return separable + overlapping
