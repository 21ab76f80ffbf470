"""Rankings against their definitions on raw states (docs/method.md)."""

import itertools
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from range_store.domain.erasure import STATISTICAL_RANKINGS
from range_store.domain.rankings import min_top_fraction, rank_order, rest_mean, saliency, top_count, top_neurons

pytestmark = pytest.mark.filterwarnings("error")
"""Degenerate statistics are expected: they must not warn."""

VALUES = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
Texts = list[np.ndarray]


@st.composite
def raw_states(draw: st.DrawFn, min_concepts: int = 1) -> Texts:
    """States of one to six texts for each of up to four concepts, [n, D]."""
    hidden = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 6), min_size=min_concepts, max_size=4))
    return [draw(arrays(np.float64, (n, hidden), elements=VALUES)) for n in sizes]


def statistics(states: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    counts = np.array([len(x) for x in states])
    mean = np.stack([x.mean(0) for x in states])
    return counts, mean, np.stack([x.std(0) for x in states]), np.stack([np.abs(x).mean(0) for x in states])


@given(raw_states())
def test_max_ranks_by_mean_absolute_value(states: Texts) -> None:
    found = saliency("max", *statistics(states))
    for c, x in enumerate(states):
        assert np.allclose(found[c], np.abs(x).mean(0))


@given(raw_states())
def test_probeless_sums_the_distances_to_the_other_means(states: Texts) -> None:
    found = saliency("probeless", *statistics(states))
    for c, x in enumerate(states):
        expected = sum((np.abs(x.mean(0) - other.mean(0)) for i, other in enumerate(states) if i != c), np.zeros(1))
        assert np.allclose(found[c], expected)


@given(raw_states())
def test_probeless_global_sums_the_distances_of_all_pairs(states: Texts) -> None:
    pairs = itertools.combinations([x.mean(0) for x in states], 2)
    expected = sum((np.abs(one - other) for one, other in pairs), np.zeros(states[0].shape[1]))
    assert np.allclose(saliency("probeless_global", *statistics(states)), [expected] * len(states))


def test_probe_ranking_cannot_be_computed_from_statistics() -> None:
    statistics_of_one = statistics([np.ones((2, 3))])
    with pytest.raises(ValueError, match=r"^the probe ranking is trained on states: see workers\.fitting\.probe$"):
        saliency("probe", *statistics_of_one)


@given(raw_states(min_concepts=2))
def test_selectivity_is_the_gap_over_the_pooled_deviation(states: Texts) -> None:
    found = saliency("selectivity", *statistics(states))
    for c, x in enumerate(states):
        rest = np.concatenate([other for i, other in enumerate(states) if i != c])
        gap = np.abs(x.mean(0) - rest.mean(0))
        pooled = np.sqrt((len(x) * x.var(0) + len(rest) * rest.var(0)) / (len(x) + len(rest)))
        told = pooled > 1e-6
        assert np.allclose(found[c][told], (gap / np.where(told, pooled, 1))[told], rtol=1e-6, atol=1e-9)


def test_selectivity_without_deviation_is_zero_or_the_largest_number() -> None:
    counts, mean, flat = np.array([2, 2]), np.array([[1.0, 3.0], [1.0, 4.0]]), np.zeros((2, 2))
    found = saliency("selectivity", counts, mean, flat, np.abs(mean))
    assert found.tolist() == [[0.0, np.finfo(np.float64).max]] * 2
    assert top_neurons(found[0], 0.5).tolist() == [1], "a neuron that separates perfectly comes first"


def test_single_concept_has_no_selectivity() -> None:
    counts, mean, std = np.array([5]), np.ones((1, 3)), np.ones((1, 3))
    assert (saliency("selectivity", counts, mean, std, mean) == -np.inf).all()
    assert (saliency("probeless", counts, mean, std, mean) == 0).all()
    assert np.isnan(rest_mean(counts, mean)).all()


@pytest.mark.parametrize("ranking", STATISTICAL_RANKINGS)
def test_unknown_statistics_rank_last(ranking: str) -> None:
    rng = np.random.default_rng(0)
    counts, mean, std = np.array([3, 4]), rng.normal(size=(2, 5)), rng.uniform(1, 2, (2, 5))
    mean_abs = np.abs(mean)
    mean[0, 2] = std[0, 2] = mean_abs[0, 2] = np.nan
    found = saliency(ranking, counts, mean, std, mean_abs)  # type: ignore[arg-type]
    assert not np.isnan(found).any()
    assert found[0, 2] == -np.inf
    assert rank_order(found[0])[-1] == 2
    assert np.isfinite(np.delete(found, 2, axis=1)).all(), "other neurons are as they were"


def test_unknown_deviation_is_not_selective_even_with_equal_means() -> None:
    counts, mean, std = np.array([2, 2]), np.ones((2, 2)), np.array([[np.nan, 1.0], [1.0, 1.0]])
    found = saliency("selectivity", counts, mean, std, mean)
    assert found[0].tolist() == [-np.inf, 0.0]


@given(raw_states(min_concepts=2))
def test_mean_of_others_weights_every_text_once(states: Texts) -> None:
    counts, mean, _, _ = statistics(states)
    found = rest_mean(counts, mean)
    for c in range(len(states)):
        rest = np.concatenate([other for i, other in enumerate(states) if i != c])
        assert np.allclose(found[c], rest.mean(0))


def test_mean_of_others_ignores_concepts_without_texts() -> None:
    found = rest_mean(np.array([0, 3, 0]), np.array([[7.0], [5.0], [9.0]]))
    assert found[0] == found[2] == 5.0
    assert np.isnan(found[1]), "the others have no text"
    assert rest_mean(np.array([1, 1]), np.array([[2.0], [3.0]])).tolist() == [[3.0], [2.0]], "one text is enough"


@given(st.integers(1, 1000), st.integers(1, 20_000))
def test_top_count_is_exact_in_decimal_arithmetic(thousandths: int, hidden: int) -> None:
    assert top_count(thousandths / 1000, hidden) == thousandths * hidden // 1000


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_top_count_is_the_floor_of_the_decimal_product(fraction: float, hidden: int) -> None:
    exact = Fraction(repr(fraction)) * hidden
    k = top_count(fraction, hidden)
    assert k <= exact < k + 1
    assert 0 <= k <= hidden


def test_top_count_avoids_binary_rounding() -> None:
    assert int(0.29 * 100) == 28
    assert top_count(0.29, 100) == 29
    assert (top_count(0.3, 10), top_count(0.3, 384), top_count(1.0, 384), top_count(0.3, 3)) == (
        3,
        115,
        384,
        0,
    )


@given(arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 1.0, np.inf])))
def test_order_is_descending_with_ties_by_index(values: np.ndarray) -> None:
    found = rank_order(values).tolist()
    assert sorted(found) == list(range(len(values)))
    for one, other in itertools.pairwise(found):
        assert values[one] > values[other] or (values[one] == values[other] and one < other)


@given(arrays(np.float64, st.integers(1, 30), elements=VALUES), st.floats(0, 1, exclude_min=True))
def test_top_is_a_prefix_of_the_order(values: np.ndarray, fraction: float) -> None:
    found = top_neurons(values, fraction)
    assert found.dtype == np.int64
    assert found.tolist() == rank_order(values)[: top_count(fraction, len(values))].tolist()
    assert top_neurons(values, 1.0).tolist() == rank_order(values).tolist()


@given(st.integers(1, 20_000))
def test_the_smallest_fraction_selects_one_neuron(hidden: int) -> None:
    fraction = min_top_fraction(hidden)
    assert top_count(fraction, hidden) >= 1
    shorter = Decimal(str(fraction)) - Decimal(1).scaleb(-len(str(hidden)))
    assert top_count(float(shorter), hidden) == 0
