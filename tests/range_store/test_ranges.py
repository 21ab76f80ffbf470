"""Range rules and the overlap of ranges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from range_store.domain.ranges import EMPTY, overlap_coefficient, range_bounds

pytestmark = pytest.mark.filterwarnings("error")
"""Degenerate statistics are expected: they must not warn."""

NUMBERS = st.floats(-1e100, 1e100, allow_nan=False)
Interval = tuple[float, float]


def sigma(tau: float, count: int, mean: float, std: float) -> Interval:
    low, high = range_bounds("sigma", tau, np.array(count), np.array(mean), np.array(std))
    return float(low), float(high)


def overlap(one: Interval, other: Interval) -> float:
    found = overlap_coefficient(*(np.array(bound) for bound in (*one, *other)))
    return float(found)


@given(st.floats(0, 1e6), st.integers(2, 10**9), NUMBERS, st.floats(0, 1e100))
def test_range_is_mean_plus_and_minus_tau_deviations(tau: float, count: int, mean: float, std: float) -> None:
    low, high = sigma(tau, count, mean, std)
    assert (low, high) == (mean - tau * std, mean + tau * std)
    assert low <= mean <= high


@given(st.floats(0, 100), st.integers(2, 100), NUMBERS)
def test_zero_deviation_gives_a_single_point(tau: float, count: int, mean: float) -> None:
    assert sigma(tau, count, mean, 0.0) == (mean, mean)


@given(st.floats(0, 100), NUMBERS, st.integers(0, 1))
def test_fewer_than_two_texts_give_the_empty_range(tau: float, mean: float, count: int) -> None:
    assert sigma(tau, count, mean, 0.0) == EMPTY


@pytest.mark.parametrize("mean", [0.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("std", [0.0, np.nan, np.inf])
def test_non_finite_statistics_give_the_empty_range(mean: float, std: float) -> None:
    finite = np.isfinite(mean) and np.isfinite(std)
    assert sigma(2.5, 10, mean, std) == ((mean, mean) if finite else EMPTY)


@pytest.mark.parametrize("value", [-np.inf, -1.0, 0.0, 1.0, np.inf, np.nan])
def test_empty_range_contains_no_value(value: float) -> None:
    low, high = EMPTY
    assert not low <= value <= high


@given(st.floats(0, 10), st.floats(0, 10), NUMBERS, st.floats(0, 1e100))
def test_larger_tau_contains_the_range_of_a_smaller_one(one: float, other: float, mean: float, std: float) -> None:
    inner, outer = sigma(min(one, other), 9, mean, std), sigma(max(one, other), 9, mean, std)
    assert outer[0] <= inner[0] <= inner[1] <= outer[1]


def test_counts_broadcast_over_neurons() -> None:
    mean, std = np.zeros((2, 3)), np.ones((2, 3))
    low, high = range_bounds("sigma", 1.0, np.array([[5], [1]]), mean, std)
    assert low.tolist() == [[-1.0] * 3, [np.inf] * 3]
    assert high.tolist() == [[1.0] * 3, [-np.inf] * 3]


INTERVALS = st.tuples(NUMBERS, NUMBERS).map(lambda pair: (min(pair), max(pair)))


@given(INTERVALS, INTERVALS)
def test_overlap_is_symmetric_and_between_zero_and_one(one: Interval, other: Interval) -> None:
    found = overlap(one, other)
    assert 0.0 <= found <= 1.0
    assert found == overlap(other, one)
    if one[1] < other[0] or other[1] < one[0]:
        assert found == 0.0
    if one[0] <= other[0] and other[1] <= one[1]:
        assert found == 1.0, "one lies in the other"


@given(INTERVALS)
def test_range_overlaps_itself_and_never_the_empty_range(one: Interval) -> None:
    assert overlap(one, one) == 1.0
    assert overlap(one, EMPTY) == overlap(EMPTY, one) == overlap(EMPTY, EMPTY) == 0.0


@given(INTERVALS, INTERVALS)
def test_reversed_bounds_overlap_nothing(one: Interval, other: Interval) -> None:
    reversed_ = one[::-1]
    if reversed_[0] > reversed_[1]:
        assert overlap(reversed_, other) == overlap(other, reversed_) == 0.0


def test_overlap_is_relative_to_the_shorter_range() -> None:
    assert overlap((0, 10), (8, 12)) == 0.5
    assert overlap((0, 1), (1, 2)) == 0.0
    assert overlap((0, 1), (1, 1)) == 1.0, "a point on the border lies inside"
    assert overlap((0, 1), (2, 2)) == 0.0
    assert overlap((3, 3), (3, 3)) == 1.0


def test_ranges_too_long_for_a_float_overlap_wholly() -> None:
    """A length that overflows is no reason for NaN: an HTTP reply could not hold it."""
    for whole in ((-np.inf, np.inf), (-1.7e308, 1.7e308)):
        assert overlap(whole, whole) == 1.0
        assert overlap(whole, (-np.inf, np.inf)) == 1.0
        assert overlap(whole, EMPTY) == 0.0
