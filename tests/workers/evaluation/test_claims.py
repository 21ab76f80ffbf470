"""Each claim can hold, not hold, or not be measured."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from range_store.domain.range_set import RangeSet, ServeLayer
from tests.range_store.builders import random_range_set
from workers.evaluation.claims import Claim, claims
from workers.evaluation.measures import MEAN, Row


def row(method: str, fraction: float, cacc: float, acc: float = -0.6, layer: int = 2, **more: Any) -> Row:
    values: dict[str, Any] = {
        "layer": layer,
        "ranking": "max",
        "method": method,
        "tau": 2.5 if method == "range" else None,
        "top_fraction": fraction,
        "target": MEAN,
        "n_target": 100,
        "n_others": 300,
        "base_acc": 0.9,
        "base_conf": 0.8,
        "base_cacc": 0.9,
        "base_cconf": 0.8,
        "delta_acc": acc,
        "delta_conf": acc,
        "delta_cacc": cacc,
        "delta_cconf": cacc,
        "delta_cacc_low": cacc - 0.02,
        "delta_cacc_high": cacc + 0.02,
    }
    return Row(**{**values, **more})


def separated(apart: bool) -> RangeSet:
    """Ranges that do not overlap at the neurons of high saliency (`apart`), or at those of low saliency."""
    template, _ = random_range_set(2, hidden=100, concepts=("a", "b"), layers=(2,), rankings=("max",))
    mean = np.zeros((2, 100))
    mean[0, :50], mean[1, :50] = 50.0, -50.0
    saliency = np.tile(np.arange(100, 0, -1.0) if apart else np.arange(100.0), (2, 1))
    return RangeSet(template.id, template.provenance, {2: ServeLayer(mean, np.ones((2, 100)), {"max": saliency})})


def verdicts(rows: list[Row], range_set: RangeSet | None = None) -> list[str]:
    return [claim.verdict for claim in claims(rows, range_set or separated(True), {})]


def test_all_claims_hold() -> None:
    rows = [row("neuron", 1.0, -0.5), row("range", 1.0, -0.01), row("range", 1.0, -0.2, layer=1)]
    found = claims(rows, separated(True), {})
    assert [claim.verdict for claim in found] == ["yes"] * 4
    assert "+49.0 points" in found[0].evidence
    assert all(isinstance(claim, Claim) and claim.evidence.endswith(".") for claim in found)


def test_no_claim_holds() -> None:
    rows = [row("neuron", 1.0, -0.02), row("range", 1.0, -0.03), row("range", 1.0, 0.1, layer=1)]
    assert verdicts(rows, separated(False)) == ["no"] * 4


@pytest.mark.parametrize(("ranged", "verdict"), [(-0.045, "no"), (-0.005, "yes")])
def test_gain_within_the_intervals_does_not_count(ranged: float, verdict: str) -> None:
    assert verdicts([row("neuron", 0.3, -0.05), row("range", 0.3, ranged)])[0] == verdict


def test_largest_gain_of_many_needs_more_than_one_gain() -> None:
    """With intervals of ±0.02, a gain of 0.03 is significant alone, and not as the largest of eight."""
    one = [row("neuron", 0.3, -0.05), row("range", 0.3, -0.02)]
    claim = claims(one, separated(True), {})[0]
    assert claim.verdict == "yes"
    assert "At most +3.0 points of the others' accuracy, at least +0.6 with 95 % confidence: " in claim.evidence
    others = [row(method, fraction / 10, -0.05) for method in ("neuron", "range") for fraction in range(4, 11)]
    claim = claims(one + others, separated(True), {})[0]
    assert claim.verdict == "no"
    assert "at least -0.6 with 95 % confidence, corrected for 8 settings: " in claim.evidence


def test_gain_without_intervals_counts_as_it_is() -> None:
    unknown = {"delta_cacc_low": np.nan, "delta_cacc_high": np.nan}
    better = [row("neuron", 0.3, -0.05, **unknown), row("range", 0.3, -0.045, **unknown)]
    claim = claims(better, separated(True), {})[0]
    assert (claim.verdict, "confidence" in claim.evidence) == ("yes", False)
    assert verdicts([row("neuron", 0.3, -0.045, **unknown), row("range", 0.3, -0.05, **unknown)])[0] == "no"


def test_claims_without_measurements_are_undecided() -> None:
    assert verdicts([row("neuron", 0.3, -0.1)]) == ["not measured", "not measured", "yes", "not measured"]
    one = random_range_set(3, concepts=("a",), layers=(2,))[0]
    assert verdicts([row("range", 0.6, -0.1)], one) == ["not measured"] * 4


def test_rows_of_single_targets_do_not_count() -> None:
    rows = [replace(row("neuron", 1.0, -0.5), target="a"), row("range", 1.0, -0.01)]
    assert verdicts(rows)[:2] == ["not measured", "not measured"]


def test_collapse_is_judged_at_the_last_measured_layer() -> None:
    rows = [row("neuron", 1.0, -0.5, layer=1), row("neuron", 1.0, -0.01), row("range", 1.0, 0.0)]
    assert verdicts(rows)[1] == "no"


def test_collapse_at_all_neurons_only_does_not_count() -> None:
    fractions = (0.6, 0.7, 0.8, 0.9, 1.0)
    ranged = [row("range", fraction, 0.0) for fraction in fractions]
    late = [row("neuron", fraction, -0.6 if fraction == 1.0 else 0.01) for fraction in fractions]
    early = [row("neuron", fraction, -0.6 if fraction > 0.7 else 0.01) for fraction in fractions]
    found = claims([*late, *ranged], separated(True), {})[1]
    assert found.verdict == "no"
    assert "1 of 5 measured fractions beyond one half, from top 1 on" in found.evidence
    assert claims([*early, *ranged], separated(True), {})[1].verdict == "yes"
