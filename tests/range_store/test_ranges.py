"""Range rules and the overlap of ranges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from range_store.ranges import bounds, overlap_coefficient

NUMBERS = st.floats(-1e100, 1e100, allow_nan=False)
Interval = tuple[float, float]


def sigma(tau: float, count: int, mean: float, std: float) -> Interval:
    low, high = bounds("sigma", tau, np.array(count), np.array(mean), np.array(std))
    return float(low), float(high)


def overlap(one: Interval, other: Interval) -> float:
    found = overlap_coefficient(*(np.array(bound) for bound in (*one, *other)))
    return float(found)


@given(st.floats(0, 1e6), st.integers(2, 10**9), NUMBERS, st.floats(0, 1e100))
def test_the_range_is_mean_plus_and_minus_tau_deviations(tau: float, count: int, mean: float, std: float) -> None:
    low, high = sigma(tau, count, mean, std)
    assert (low, high) == (mean - tau * std, mean + tau * std)
    assert low <= mean <= high


@given(st.floats(0, 100), st.integers(2, 100), NUMBERS)
def test_without_spread_it_is_the_point_itself(tau: float, count: int, mean: float) -> None:
    assert sigma(tau, count, mean, 0.0) == (mean, mean)


@given(st.floats(0, 100), NUMBERS)
def test_one_text_has_no_range(tau: float, mean: float) -> None:
    low, high = sigma(tau, 1, mean, 0.0)
    assert low > high


@pytest.mark.parametrize("mean", [0.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("std", [0.0, np.nan, np.inf])
def test_statistics_that_are_no_numbers_give_no_range(mean: float, std: float) -> None:
    low, high = sigma(2.5, 10, mean, std)
    if np.isfinite(mean) and np.isfinite(std):
        assert low <= high
    else:
        assert low > high
        assert not any(low <= value <= high for value in (-np.inf, -1.0, 0.0, 1.0, np.inf, np.nan))


@given(st.floats(0, 10), st.floats(0, 10), NUMBERS, st.floats(0, 1e100))
def test_a_larger_tau_holds_all_that_a_smaller_one_holds(one: float, other: float, mean: float, std: float) -> None:
    inner, outer = sigma(min(one, other), 9, mean, std), sigma(max(one, other), 9, mean, std)
    assert outer[0] <= inner[0] <= inner[1] <= outer[1]


def test_counts_broadcast_over_neurons() -> None:
    mean, std = np.zeros((2, 3)), np.ones((2, 3))
    low, high = bounds("sigma", 1.0, np.array([[5], [1]]), mean, std)
    assert low.tolist() == [[-1.0] * 3, [np.inf] * 3]
    assert high.tolist() == [[1.0] * 3, [-np.inf] * 3]


INTERVALS = st.tuples(NUMBERS, NUMBERS).map(lambda pair: (min(pair), max(pair)))


@given(INTERVALS, INTERVALS)
def test_the_overlap_is_symmetric_and_a_share(one: Interval, other: Interval) -> None:
    found = overlap(one, other)
    assert 0.0 <= found <= 1.0
    assert found == overlap(other, one)
    if one[1] < other[0] or other[1] < one[0]:
        assert found == 0.0
    if one[0] <= other[0] and other[1] <= one[1]:
        assert found == 1.0, "one lies in the other"


@given(INTERVALS)
def test_a_range_overlaps_itself_wholly_and_the_empty_one_never(one: Interval) -> None:
    empty = (np.inf, -np.inf)
    assert overlap(one, one) == 1.0
    assert overlap(one, empty) == overlap(empty, one) == overlap(empty, empty) == 0.0


def test_the_share_is_of_the_shorter_one() -> None:
    assert overlap((0, 10), (8, 12)) == 0.5
    assert overlap((0, 1), (1, 2)) == 0.0
    assert overlap((0, 1), (1, 1)) == 1.0, "a point on the border lies inside"
    assert overlap((0, 1), (2, 2)) == 0.0
    assert overlap((3, 3), (3, 3)) == 1.0
