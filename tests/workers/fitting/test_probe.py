"""The probe minimises its objective, finds the neurons that separate concepts, and ignores the order of rows."""

import numpy as np
import pytest
from scipy.optimize import minimize

from range_store.domain.range_set import ProbeSettings
from workers.fitting.probe import ProbeSample, probe_saliency

CONCEPTS = ("a", "b", "c")


def filled(settings: ProbeSettings, rows: int = 600, hidden: int = 5, seed: int = 0) -> ProbeSample:
    rng = np.random.default_rng(seed)
    concept = rng.integers(0, 3, size=rows)
    centres = np.zeros((3, hidden))
    centres[0, 0], centres[1, 1] = 2.0, -2.0  # neuron 0 separates a, neuron 1 separates b; the rest is noise
    states = (centres[concept] + rng.normal(size=(rows, hidden))) * np.array([1, 100, 1e-3, 1, 1])[:hidden] + 7
    sample = ProbeSample.draw(rows, 1, hidden, settings)
    for start in range(0, rows, 250):
        part = slice(start, start + 250)
        sample.update(start, states[part, None].astype(np.float32), concept[part])
    return sample


def test_separating_neurons_rank_first_at_any_scale() -> None:
    settings = ProbeSettings(rows=600)
    weights = probe_saliency(filled(settings), 0, CONCEPTS, CONCEPTS, settings)
    assert weights.shape == (3, 5)
    assert weights[0].argmax() == 0
    assert weights[1].argmax() == 1
    assert set(np.argsort(-weights[2])[:2]) == {0, 1}


def test_probe_minimises_log_loss_with_both_penalties() -> None:
    settings = ProbeSettings(l1=0.01, l2=0.02, rows=600, iterations=5000)
    sample = filled(settings)
    found = probe_saliency(sample, 0, CONCEPTS, CONCEPTS, settings)
    states = sample.states[:, 0].astype(np.float64)
    scaled = (states - states.mean(axis=0)) / states.std(axis=0)

    def objective(parameters: np.ndarray) -> float:
        w, b = parameters[:15].reshape(3, 5), parameters[15:]
        scores = scaled @ w.T + b
        log = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        loss = -log[np.arange(len(scaled)), sample.concept].mean()
        return float(loss + settings.l1 * np.abs(w).sum() + settings.l2 * (w**2).sum())

    best = minimize(
        objective, np.full(18, 0.01), method="Powell", options={"maxiter": 20000, "ftol": 1e-10, "xtol": 1e-8}
    )
    np.testing.assert_allclose(found, np.abs(best.x[:15].reshape(3, 5)), atol=0.02)


def test_sample_depends_on_row_numbers_only() -> None:
    settings = ProbeSettings(rows=100, seed=3)
    whole, parts = ProbeSample.draw(500, 2, 4, settings), ProbeSample.draw(500, 2, 4, settings)
    states = np.random.default_rng(0).normal(size=(500, 2, 4)).astype(np.float32)
    concept = np.arange(500) % 3
    whole.update(0, states, concept)
    for start in (300, 0, 450, 100):
        end = {300: 450, 0: 100, 450: 500, 100: 300}[start]
        parts.update(start, states[start:end], concept[start:end])
    assert np.array_equal(whole.states, parts.states)
    assert np.array_equal(whole.concept, parts.concept)
    assert len(set(whole.rows)) == 100
    assert not np.array_equal(whole.rows, ProbeSample.draw(500, 2, 4, ProbeSettings(rows=100, seed=4)).rows)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 5.0])
def test_constant_or_non_finite_neuron_has_no_weight(broken: float) -> None:
    settings = ProbeSettings(rows=600)
    sample = filled(settings)
    sample.states[:, 0, 4] = broken
    weights = probe_saliency(sample, 0, CONCEPTS, CONCEPTS, settings)
    assert np.isfinite(weights).all()
    assert (weights[:, 4] == 0).all()


def test_two_concepts_share_weights_and_a_single_one_has_none() -> None:
    settings = ProbeSettings(rows=600)
    sample = filled(settings)
    weights = probe_saliency(sample, 0, ("a", "b"), CONCEPTS, settings)
    assert np.array_equal(weights[0], weights[1])
    assert weights.any()
    assert not probe_saliency(sample, 0, ("a",), CONCEPTS, settings).any()
