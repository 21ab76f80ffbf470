"""Streaming moments against whole-data references: error of the r-th central moment ≤ 1e-12·σ^r."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.fitting.moments import Moments

Floats = npt.NDArray[np.float64]


def reference(states: npt.NDArray[np.float32]) -> tuple[Floats, dict[int, Floats]]:
    """Mean and central moments in extended precision, from all rows at once."""
    values = states.astype(np.longdouble)
    mean = values.mean(axis=0)
    deviation = values - mean
    return mean.astype(np.float64), {r: (deviation**r).mean(axis=0).astype(np.float64) for r in (2, 3, 4)}


def close(moments: Moments, states: npt.NDArray[np.float32]) -> None:
    mean, central = reference(states)
    sigma = np.sqrt(central[2])
    assert moments.count == len(states)
    # the mean itself is a float64: half a unit in its last place beside what is allowed for σ
    assert (np.abs(moments.mean - mean) <= 1e-12 * sigma + np.spacing(np.abs(mean))).all()
    for r in (2, 3, 4):
        # likewise a moment far above σ^r: no float64 is nearer than its spacing
        allowed = 1e-12 * sigma**r + 2 * np.spacing(np.abs(central[r]))
        assert (np.abs(moments.central(r) - central[r]) <= allowed).all(), f"moment {r}"
    assert np.array_equal(moments.minimum, states.min(axis=0))
    assert np.array_equal(moments.maximum, states.max(axis=0))
    assert moments.mean_abs == pytest.approx(np.abs(states.astype(np.float64)).mean(axis=0), rel=1e-12)


def shards(states: npt.NDArray[np.float32], cuts: list[int]) -> list[Moments]:
    edges = [0, *sorted(cut % (len(states) + 1) for cut in cuts), len(states)]
    return [Moments.of(states[a:b]) for a, b in pairwise(edges)]


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 300),
    ratio=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    shape=st.sampled_from(["normal", "skewed", "heavy", "two values"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=200)
def test_any_shards_in_any_order_equal_the_whole(
    seed: int, rows: int, ratio: float, scale: float, shape: str, cuts: list[int], order: object
) -> None:
    rng = np.random.default_rng(seed)
    drawn = {
        "normal": lambda: rng.normal(size=(rows, 5)),
        "skewed": lambda: rng.exponential(size=(rows, 5)),
        "heavy": lambda: rng.standard_t(3, size=(rows, 5)),
        "two values": lambda: rng.integers(0, 2, size=(rows, 5)).astype(float),
    }[shape]()
    states = ((drawn + ratio) * scale).astype(np.float32)
    parts = shards(states, cuts)
    order.shuffle(parts)  # type: ignore[attr-defined]
    merged = Moments.empty((5,))
    for part in parts:
        merged = merged.merge(part)
    close(merged, states)


@given(seed=st.integers(0, 2**32 - 1), n=st.lists(st.integers(0, 40), min_size=3, max_size=3))
@settings(deadline=None)
def test_merging_is_associative_up_to_rounding(seed: int, n: list[int]) -> None:
    rng = np.random.default_rng(seed)
    blocks = [(rng.normal(size=(size, 4)) + rng.normal() * 100).astype(np.float32) for size in n]
    a, b, c = (Moments.of(block) for block in blocks)
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    whole = np.concatenate(blocks)
    if len(whole):
        close(left, whole)
        close(right, whole)


def test_one_part_far_larger_than_the_other() -> None:
    rng = np.random.default_rng(3)
    states = np.concatenate([rng.normal(50, 1, size=(20_000, 3)), rng.normal(-50, 1, size=(1, 3))]).astype(np.float32)
    close(Moments.of(states[:20_000]).merge(Moments.of(states[20_000:])), states)
    close(Moments.of(states[20_000:]).merge(Moments.of(states[:20_000])), states)


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), n=st.lists(st.integers(1, 50), min_size=1))
def test_a_constant_neuron_is_exactly_constant(value: float, n: list[int]) -> None:
    merged = Moments.empty((1,))
    for size in n:
        merged = merged.merge(Moments.of(np.full((size, 1), value, dtype=np.float32)))
    assert merged.mean[0] == merged.minimum[0] == merged.maximum[0] == np.float32(value)
    assert [merged.central(r)[0] for r in (2, 3, 4)] == [0.0, 0.0, 0.0]


def test_no_rows_are_the_identity() -> None:
    some = Moments.of(np.arange(12, dtype=np.float32).reshape(4, 3))
    empty = Moments.of(np.empty((0, 3), dtype=np.float32))
    for merged in (some.merge(empty), empty.merge(some)):
        assert merged is some
    assert empty.count == 0


def test_nan_and_infinity_spoil_their_own_neuron_only() -> None:
    states = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    good = states.copy()
    states[7, 1], states[30, 2] = np.nan, np.inf
    with np.errstate(all="raise"):
        merged = Moments.of(states[:20]).merge(Moments.of(states[20:]))
    whole = Moments.of(good[:20]).merge(Moments.of(good[20:]))
    assert np.isnan(merged.mean).tolist() == np.isnan(merged.std).tolist() == [False, True, True, False]
    for name in ("mean", "std", "mean_abs"):
        assert np.array_equal(getattr(merged, name)[[0, 3]], getattr(whole, name)[[0, 3]])


def test_any_shape_of_variables() -> None:
    states = np.random.default_rng(1).normal(size=(9, 2, 3)).astype(np.float32)
    flat = Moments.of(states.reshape(9, 6))
    assert np.array_equal(Moments.of(states).central(4).ravel(), flat.central(4))
