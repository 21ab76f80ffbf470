"""Range rules: from a concept's statistics to the interval of a neuron's values that it occupies (paper §4)."""

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Rule

EMPTY = (np.inf, -np.inf)
"""Bounds of a range that holds no value at all."""


def range_bounds(
    rule: Rule,
    tau: float,
    counts: npt.NDArray[np.int64],
    mean: npt.NDArray[np.float64],
    std: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Closed intervals [low, high], each of `mean`'s shape; `counts` broadcasts against it.

    Degenerate statistics: one text has no spread to speak of, and NaN none at all, so both give the empty range
    (low > high), which masks nothing; σ = 0 over two texts or more gives the single point [μ, μ].
    """
    match rule:
        case "sigma":
            with np.errstate(invalid="ignore"):  # ∞ − ∞; it is called empty below
                low, high = mean - tau * std, mean + tau * std
    empty = (counts < 2) | ~np.isfinite(mean) | ~np.isfinite(std)
    return np.where(empty, EMPTY[0], low), np.where(empty, EMPTY[1], high)


def overlap_coefficient(
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    other_low: npt.NDArray[np.float64],
    other_high: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Length that two intervals share, over the shorter one's length: 1 if one lies in the other, 0 if disjoint.

    A point inside the other interval counts as wholly overlapped; an empty range overlaps nothing.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shared = np.minimum(high, other_high) - np.maximum(low, other_low)
        shorter = np.minimum(high - low, other_high - other_low)
        ratio = np.where(shorter > 0, shared / shorter, np.where(shared >= 0, 1.0, 0.0))
    ratio = np.where(shared == np.inf, 1.0, ratio)  # τ is so large that both ranges hold every value
    return np.maximum(ratio, 0.0)  # disjoint ranges share a negative length, and so does an empty one with any other
