"""Histograms count every finite value in the bin between its edges."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.fitting.histograms import count, edges_from


@given(
    seed=st.integers(0, 2**32 - 1),
    bins=st.sampled_from([1, 7, 64, 512]),
    scale=st.sampled_from([1e-6, 1.0, 1e5]),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
)
@settings(deadline=None)
def test_counts_equal_a_binary_search_in_the_edges(seed: int, bins: int, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    first = ((rng.normal(size=(40, 3)) + offset) * scale).astype(np.float32)
    edges = edges_from(first, bins)
    later = ((rng.standard_t(2, size=(60, 3)) + offset) * scale).astype(np.float32)
    later[:5] = edges[:, rng.integers(0, bins + 1, size=5)].T.astype(np.float32)  # on the edges themselves
    counted = count(later, edges)
    for neuron in range(3):
        places = np.searchsorted(edges[neuron], later[:, neuron].astype(np.float64), side="right")
        assert np.array_equal(counted[neuron], np.bincount(places, minlength=bins + 2))
    assert counted.sum() == later.size


def test_edges_ascend_and_enclose_the_first_block() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(100, 6)).astype(np.float32)
    states[:, 1] = 3.5  # constant
    states[:, 2] = np.nan
    states[::2, 3] = np.inf
    states[:, 4] = 0.0
    states[:, 5] = 1e30
    edges = edges_from(states, 512)
    assert (np.diff(edges, axis=1) > 0).all()
    counted = count(states, edges)
    assert counted[[0, 1, 4, 5], 1:-1].sum(axis=1).tolist() == [100, 100, 100, 100]
    assert counted[2].sum() == 0, "NaN is in no bin"
    assert counted[3, -1] == 50, "infinity lies above every edge"


def test_no_rows_give_empty_counts() -> None:
    edges = edges_from(np.ones((3, 2), dtype=np.float32), 4)
    assert count(np.empty((0, 2), dtype=np.float32), edges).sum() == 0
