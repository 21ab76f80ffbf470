"""Range rules: the interval of a neuron's values that a concept occupies, from its statistics (paper §4)."""

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Rule

EMPTY = (np.inf, -np.inf)
"""Bounds of a range without any value."""


def range_bounds(
    rule: Rule,
    tau: float,
    counts: npt.NDArray[np.int64],
    mean: npt.NDArray[np.float64],
    std: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return closed intervals [low, high], each of `mean`'s shape; `counts` broadcasts against it.

    One text has no spread and NaN no value, so both give the empty range (low > high), which masks nothing. σ = 0 over
    two or more texts gives the single point [μ, μ].
    """
    match rule:
        case "sigma":
            with np.errstate(invalid="ignore"):  # ∞ − ∞, which gives an empty range below
                low, high = mean - tau * std, mean + tau * std
    empty = (counts < 2) | ~np.isfinite(mean) | ~np.isfinite(std)
    return np.where(empty, EMPTY[0], low), np.where(empty, EMPTY[1], high)


def overlap_coefficient(
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    other_low: npt.NDArray[np.float64],
    other_high: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the shared length of two intervals over the shorter one's: 1 if one contains the other, 0 if disjoint.

    A point inside the other interval counts as 1. An empty range overlaps nothing.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shared = np.minimum(high, other_high) - np.maximum(low, other_low)
        shorter = np.minimum(high - low, other_high - other_low)
        ratio = np.where(shorter > 0, shared / shorter, np.where(shared >= 0, 1.0, 0.0))
    ratio = np.where(shared == np.inf, 1.0, ratio)  # with a huge τ both ranges contain every value
    return np.maximum(ratio, 0.0)  # the length is negative for disjoint and for empty ranges
