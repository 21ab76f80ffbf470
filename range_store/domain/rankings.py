"""Rankings: how salient each neuron is for each concept (paper §3.2; docs/method.md).

Statistics and saliencies are [C, D] float64 (C concepts, D neurons); higher is more salient. A saliency that cannot be
computed (NaN statistics) is −∞ and ranks last.
"""

import math
from decimal import ROUND_FLOOR, Decimal

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Ranking

Array = npt.NDArray[np.float64]


def saliency(ranking: Ranking, counts: npt.NDArray[np.int64], mean: Array, std: Array, mean_abs: Array) -> Array:
    """Return the saliency [C, D] of every neuron for every concept under one ranking.

    Args:
        counts: texts per concept, [C].
        mean, std, mean_abs: statistics per concept and neuron, [C, D]; std has ddof 0.
    """
    match ranking:
        case "max":
            value = mean_abs
        case "probeless":
            value = _gaps(mean)
        case "probeless_global":  # Σ over pairs, equal for all concepts; each pair is in two of the sums
            value = np.broadcast_to(_gaps(mean).sum(axis=0) / 2, mean.shape)
        case "selectivity":
            value = _selectivity(counts, mean, std)
        case "probe":
            raise ValueError("the probe ranking is trained on states: see workers.fitting.probe")
    return np.where(np.isnan(value), -np.inf, value)


def _gaps(mean: Array) -> Array:
    """Σ over c' ≠ c of |μ_c − μ_c'|, [C, D]."""
    total = np.zeros_like(mean)
    for other in mean:
        total += np.abs(mean - other)
    return total


def _selectivity(counts: npt.NDArray[np.int64], mean: Array, std: Array) -> Array:
    """|μ_c − μ_r| over the pooled within-group deviation, r = all other texts.

    Where the pooled deviation is 0, equal means give 0 and different ones the largest finite number. NaN without other
    texts.
    """
    mean_of_rest = rest_mean(counts, mean)
    n = counts[:, None].astype(np.float64)
    n_rest = n.sum() - n
    # Σ over c' ≠ c of n_c'(σ² + (μ_c' − μ_r)²), as squares to avoid differences of large numbers
    rest_variance_sum = np.zeros_like(mean)
    for c in range(len(counts)):
        others = np.arange(len(counts)) != c
        rest_variance_sum[c] = (n[others] * (std[others] ** 2 + (mean[others] - mean_of_rest[c]) ** 2)).sum(axis=0)
    pooled = np.sqrt((n * std**2 + rest_variance_sum) / (n + n_rest))
    gap = np.abs(mean - mean_of_rest)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = gap / pooled
    ratio = np.where((pooled == 0) & (gap == 0), 0.0, ratio)
    return np.where((pooled == 0) & (gap > 0), np.finfo(np.float64).max, ratio)


def rest_mean(counts: npt.NDArray[np.int64], mean: Array) -> Array:
    """Return the mean over all texts of the other concepts, [C, D]; NaN without other texts."""
    result = np.full_like(mean, np.nan)
    for c in range(len(counts)):
        others = np.arange(len(counts)) != c
        if counts[others].sum() > 0:
            result[c] = np.average(mean[others], axis=0, weights=counts[others])
    return result


def top_count(top_fraction: float, hidden: int) -> int:
    """Return k = ⌊p·D⌋ in decimal arithmetic, so that 0.3 of 10 neurons is 3 despite binary rounding."""
    return int((Decimal(str(top_fraction)) * hidden).to_integral_value(ROUND_FLOOR))


def rank_order(saliency_of_concept: Array) -> npt.NDArray[np.int64]:
    """Return the neurons [D] from most to least salient; of equal ones the lower index comes first."""
    return np.argsort(-saliency_of_concept, kind="stable").astype(np.int64)


def top_neurons(saliency_of_concept: Array, top_fraction: float) -> npt.NDArray[np.int64]:
    """Return the k most salient neurons of one concept, most salient first."""
    return rank_order(saliency_of_concept)[: top_count(top_fraction, saliency_of_concept.shape[-1])]


def min_top_fraction(neurons: int) -> float:
    """Return a short decimal that selects one of so many neurons; any smaller one of as many digits selects none."""
    scale = math.pow(10, len(str(neurons)))
    return math.ceil(scale / neurons) / scale
