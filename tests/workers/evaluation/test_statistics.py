"""Statistics of activations equal those that scipy computes from the values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from range_store.domain.range_set import InspectLayer
from tests.range_store.builders import random_range_set
from workers.evaluation.statistics import (
    POOLED,
    ks_distance,
    neurons_by_rank,
    range_overlap,
    shapes,
    shared_neurons,
)
from workers.fitting.fitter import RangeFitter
from workers.fitting.moments import Moments

SAMPLERS = {
    "normal": lambda rng, n: rng.normal(3.0, 2.0, n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "exponential": lambda rng, n: rng.exponential(1.0, n),
    "two humps": lambda rng, n: rng.normal(np.where(rng.random(n) < 0.5, -4, 4), 1.0),
}


def fitted(values: np.ndarray, bins: int = 512, concepts: list[str] | None = None) -> RangeFitter:
    """Statistics of `values` [n, D] as one layer."""
    names = concepts or ["a"] * len(values)
    fitter = RangeFitter(tuple(dict.fromkeys(names)), 1, values.shape[1], bins)
    for start in range(0, len(values), 1024):
        fitter.update(values[start : start + 1024, None].astype(np.float32), names[start : start + 1024])
    return fitter


def moments_of(values: np.ndarray) -> Moments:
    deviation = values - values.mean(axis=0)
    return Moments.from_central(
        len(values), values.mean(axis=0), values.std(axis=0), (deviation**3).mean(axis=0), (deviation**4).mean(axis=0)
    )


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 60), m=st.integers(2, 60), apart=st.floats(-50, 50))
@settings(max_examples=60, deadline=None)
def test_merged_moments_equal_those_of_all_values(seed: int, n: int, m: int, apart: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(n, 3)), rng.exponential(2.0, size=(m, 3)) + apart
    found, expected = moments_of(one).merge(moments_of(other)), moments_of(np.concatenate([one, other]))
    scale = expected.std
    assert found.count == expected.count
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-10)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-10)
    np.testing.assert_allclose(found.central(3) / scale**3, expected.central(3) / scale**3, atol=1e-9)
    np.testing.assert_allclose(found.central(4) / scale**4, expected.central(4) / scale**4, atol=1e-9)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("bins", [16, 512])
def test_ks_distance_lies_within_its_bounds(name: str, bins: int) -> None:
    rng = np.random.default_rng(0)
    values = np.stack([SAMPLERS[name](rng, 3000) for _ in range(4)], axis=1).astype(np.float32).astype(np.float64)
    fitter = fitted(values, bins)
    assert fitter.edges is not None
    mean, std = values.mean(axis=0), values.std(axis=0)
    low, high = ks_distance(mean, std, fitter.edges[0], fitter.histogram[0, 0])
    for neuron in range(4):
        true = stats.kstest((values[:, neuron] - mean[neuron]) / std[neuron], "norm").statistic
        assert low[neuron] - 1e-9 <= true <= high[neuron] + 1e-9
    if bins == 512:
        assert (high - low).max() < 0.02


def test_shapes_per_concept_and_pooled() -> None:
    rng = np.random.default_rng(1)
    concepts = [["a", "b"][number] for number in rng.integers(0, 2, size=4000)]
    is_a = np.array(concepts) == "a"
    values = np.stack([rng.normal(size=4000), rng.exponential(1.0, 4000) + 5.0 * is_a, np.full(4000, 2.5)], axis=1)
    values = values.astype(np.float32).astype(np.float64)
    fitter = fitted(values, concepts=concepts)
    serve, inspect = fitter.layer(0, fitter.concepts, ("max",), None)
    template, _ = random_range_set(1, hidden=3, concepts=fitter.concepts, layers=(0,), n_layers=1)
    counts = dict(fitter.counts)
    corpus = template.provenance.corpus.model_copy(update={"counts": counts})
    provenance = template.provenance.model_copy(update={"corpus": corpus})
    range_set = type(template)(template.id, provenance, {0: serve})
    rows = {row.concept: row for row in shapes(range_set, 0, inspect)}
    for concept, chosen in (("a", is_a), ("b", ~is_a), (POOLED, np.ones(4000, dtype=bool))):
        row = rows[concept]
        own = values[chosen][:, :2]
        assert (row.texts, row.neurons, row.left_out) == (int(chosen.sum()), 2, 1)
        assert row.skewness == pytest.approx(stats.skew(own, axis=0).mean(), abs=1e-6)
        assert row.absolute_skewness == pytest.approx(np.abs(stats.skew(own, axis=0)).mean(), abs=1e-6)
        assert row.kurtosis == pytest.approx(stats.kurtosis(own, axis=0, fisher=False).mean(), abs=1e-5)
        assert row.gaussian_surely <= row.gaussian_possibly
    assert rows["a"].gaussian_possibly == 0.5, "the normal neuron, and not the exponential one"


def test_ranges_apart_at_the_top_neurons_are_found() -> None:
    template, inspect = random_range_set(2, hidden=100, concepts=("a", "b"), layers=(0,), n_layers=1)
    mean = np.zeros((2, 100))
    mean[0, :5], mean[1, :5] = 50.0, -50.0  # the first five neurons separate the concepts
    serve = type(template.layers[0])(mean, np.ones((2, 100)), {"max": np.abs(mean) + 1e-3})
    range_set = type(template)(template.id, template.provenance, {0: serve})
    found = range_overlap(range_set, 0, "max")
    assert (found.neurons, found.top, found.bottom) == (5, 0.0, 1.0)
    ranked = neurons_by_rank(range_set, 0, "max", "a")
    assert [each.reason for each in ranked] == ["top", "top", "middle", "middle", "bottom", "bottom"]
    assert {each.neuron for each in ranked[:2]} <= set(range(5))
    shared = shared_neurons(range_set, 0, "max")
    assert {each.neuron for each in shared} <= set(range(5))
    assert "2 of 2 concepts" in shared[0].reason
    assert isinstance(inspect[0], InspectLayer)
