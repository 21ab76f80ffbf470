"""Streaming moments against references on all rows: the error of the r-th central moment is at most 1e-12·σ^r."""

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


def assert_close(moments: Moments, states: npt.NDArray[np.float32]) -> None:
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
def test_merged_shards_in_any_order_equal_the_whole(
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
    assert_close(merged, states)


@given(seed=st.integers(0, 2**32 - 1), n=st.lists(st.integers(0, 40), min_size=3, max_size=3))
@settings(deadline=None)
def test_merge_is_associative_up_to_rounding(seed: int, n: list[int]) -> None:
    rng = np.random.default_rng(seed)
    chunks = [(rng.normal(size=(size, 4)) + rng.normal() * 100).astype(np.float32) for size in n]
    a, b, c = (Moments.of(chunk) for chunk in chunks)
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    whole = np.concatenate(chunks)
    if len(whole):
        assert_close(left, whole)
        assert_close(right, whole)


def test_merge_of_very_unequal_parts_is_exact() -> None:
    rng = np.random.default_rng(3)
    states = np.concatenate([rng.normal(50, 1, size=(20_000, 3)), rng.normal(-50, 1, size=(1, 3))]).astype(np.float32)
    assert_close(Moments.of(states[:20_000]).merge(Moments.of(states[20_000:])), states)
    assert_close(Moments.of(states[20_000:]).merge(Moments.of(states[:20_000])), states)


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False), n=st.lists(st.integers(1, 50), min_size=1))
def test_constant_neuron_has_no_deviation(value: float, n: list[int]) -> None:
    merged = Moments.empty((1,))
    for size in n:
        merged = merged.merge(Moments.of(np.full((size, 1), value, dtype=np.float32)))
    assert merged.mean[0] == merged.minimum[0] == merged.maximum[0] == np.float32(value)
    assert [merged.central(r)[0] for r in (2, 3, 4)] == [0.0, 0.0, 0.0]


def test_empty_moments_are_the_identity_of_merge() -> None:
    some = Moments.of(np.arange(12, dtype=np.float32).reshape(4, 3))
    for empty in (Moments.of(np.empty((0, 3), dtype=np.float32)), Moments.empty((3,))):
        assert some.merge(empty) is empty.merge(some) is some


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_empty_moments_are_zero(shape: tuple[int, ...]) -> None:
    for empty in (Moments.empty(shape), Moments.of(np.empty((0, *shape), dtype=np.float32))):
        assert empty.count == 0
        for zero in (empty.mean, empty.std, empty.mean_abs, *(empty.central(r) for r in (2, 3, 4))):
            assert np.array_equal(zero, np.zeros(shape))
        assert np.array_equal(empty.minimum, np.full(shape, np.inf))
        assert np.array_equal(empty.maximum, np.full(shape, -np.inf))


def test_moments_of_one_row_and_of_two_follow_their_definitions() -> None:
    one, two = Moments.of(np.array([[3.0]], np.float32)), Moments.of(np.array([[3.0], [-1.0]], np.float32))
    assert (one.count, one.mean[0], one.mean_abs[0], one.std[0]) == (1, 3.0, 3.0, 0.0)
    assert (two.count, two.mean[0], two.mean_abs[0], two.std[0]) == (2, 1.0, 2.0, 2.0)
    assert [two.central(r)[0] for r in (2, 3, 4)] == [4.0, 0.0, 16.0]


def test_unknown_power_is_rejected() -> None:
    for power in (0, 1, 5):
        with pytest.raises(KeyError):
            Moments.empty((1,)).central(power)


def test_nan_and_infinity_affect_only_their_neuron() -> None:
    states = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    good = states.copy()
    states[7, 1], states[30, 2] = np.nan, np.inf
    with np.errstate(all="raise"):
        merged = Moments.of(states[:20]).merge(Moments.of(states[20:]))
    whole = Moments.of(good[:20]).merge(Moments.of(good[20:]))
    for name in ("mean", "std", "mean_abs", "minimum", "maximum", "m3", "m4"):
        assert np.isnan(getattr(merged, name)).tolist() == [False, True, True, False], name
        assert np.array_equal(getattr(merged, name)[[0, 3]], getattr(whole, name)[[0, 3]])


def test_variables_may_have_any_shape() -> None:
    states = np.random.default_rng(1).normal(size=(9, 2, 3)).astype(np.float32)
    flat = Moments.of(states.reshape(9, 6))
    assert np.array_equal(Moments.of(states).central(4).ravel(), flat.central(4))
