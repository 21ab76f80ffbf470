"""Histograms of every neuron's values, with edges from a sample of the texts and overflow columns."""

import numpy as np
import numpy.typing as npt

WIDEN = 0.25
"""How far the edges reach beyond the values of the sample on either side, as a share of their span."""


def edges_from(states: npt.NDArray[np.floating], bins: int) -> npt.NDArray[np.float64]:
    """Strictly ascending edges [D, bins + 1] around the values of a sample [n, D], with a margin.

    The edges of a constant neuron are around its value, those of a neuron without a finite value around 0.
    """
    finite = np.isfinite(states)
    seen = finite.any(axis=0)
    low = np.where(seen, np.min(states, axis=0, where=finite, initial=np.inf), 0.0).astype(np.float64)
    high = np.where(seen, np.max(states, axis=0, where=finite, initial=-np.inf), 0.0).astype(np.float64)
    span = high - low
    span = np.where(span > 0, span, np.maximum(np.abs(low), 1.0) * 1e-3)
    low, high = low - WIDEN * span, high + WIDEN * span
    return low[:, None] + (high - low)[:, None] * (np.arange(bins + 1) / bins)


def count(states: npt.NDArray[np.floating], edges: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Values per bin, [D, bins + 2]: below the first edge, in [edge_b, edge_b+1), at or above the last edge.

    NaN falls in no bin. states: [n, D]; edges: [D, bins + 1].
    """
    hidden, bins = edges.shape[0], edges.shape[1] - 1
    if not len(states):
        return np.zeros((hidden, bins + 2), dtype=np.int64)
    values = states.astype(np.float64)
    is_number = ~np.isnan(values)
    neuron = np.broadcast_to(np.arange(hidden), values.shape)
    low, width = edges[:, 0], (edges[:, -1] - edges[:, 0]) / bins
    with np.errstate(invalid="ignore"):
        guess = np.floor((values - low) / width)
    place = np.clip(np.where(is_number, guess, 0), -1, bins).astype(np.int64)
    # the guess may be one bin off near an edge, so values are compared with the edges
    below = is_number & (place >= 0) & (values < edges[neuron, np.clip(place, 0, bins)])
    place = place - below
    above = is_number & (place < bins) & (values >= edges[neuron, np.clip(place + 1, 0, bins)])
    place = place + above
    flat = (neuron * (bins + 2) + place + 1)[is_number]
    return np.bincount(flat, minlength=hidden * (bins + 2)).reshape(hidden, bins + 2)
