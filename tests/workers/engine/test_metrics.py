"""The engine's metrics agree with its answers."""

from collections.abc import Callable

import pytest

from range_store.domain.erasure import Erasure
from tests.workers.engine.running import TEXTS, Running
from workers.engine.metrics import MAX_CONCEPTS, OTHER_CONCEPTS
from workers.models.prepack import STEP

SPORTS, WORLD = Erasure(concept="Sports", top_fraction=1.0), Erasure(concept="World", top_fraction=0.5)


def test_masked_and_maskable_neurons_are_counted_by_concept(start: Callable[..., Running]) -> None:
    service = start(watched_batches=0.0)
    answers = [service.ask(TEXTS[:7], [SPORTS]), service.ask(TEXTS[:5], [SPORTS, WORLD]), service.ask(TEXTS[:3], [])]
    hidden = service.model.identity.hidden_size
    assert service.metric("neuronlens_concept_neurons_total", concept="Sports") == 12 * hidden
    assert service.metric("neuronlens_concept_neurons_total", concept="World") == 5 * hidden
    own = sum(text.masked_neurons for text in answers[0].texts)
    union = sum(text.masked_neurons for text in answers[1].texts)
    sports = service.metric("neuronlens_concept_masked_neurons_total", concept="Sports")
    world = service.metric("neuronlens_concept_masked_neurons_total", concept="World")
    assert own < sports <= own + union <= sports + world
    assert service.metric("neuronlens_masked_neurons_total") == own + union


@pytest.mark.parametrize("layer", [-1, 0])
def test_changed_labels_are_counted_where_the_baseline_is_known(start: Callable[..., Running], layer: int) -> None:
    erasure = Erasure(concept="SciTech", top_fraction=1.0, tau=5.0, layers=(layer,))
    compared, sampled, blind = (start(watched_batches=share) for share in (0.0, 1.0, 0.0))
    answer = compared.ask(TEXTS, [erasure], compare=True)
    changed = sum(text.baseline is not None and text.logits.argmax() != text.baseline.argmax() for text in answer.texts)
    assert changed > 0
    sampled.ask(TEXTS, [erasure])
    blind.ask(TEXTS, [erasure])
    for service in (compared, sampled):
        assert service.metric("neuronlens_concept_watched_texts_total", concept="SciTech") == len(TEXTS)
        assert service.metric("neuronlens_concept_changed_labels_total", concept="SciTech") == changed
    assert blind.registry.get_sample_value("neuronlens_concept_watched_texts_total", {"concept": "SciTech"}) is None


def test_configured_share_of_batches_is_watched(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is watched if its draw is below the share."""
    service = start(watched_batches=0.25, max_batch_texts=1)
    draws = iter([0.0, 0.9, 0.24, 0.25] * 5)
    monkeypatch.setattr(service.engine._runner._watch, "random", lambda: next(draws))
    service.ask(TEXTS[:20], [SPORTS])
    assert list(draws) == []
    assert service.metric("neuronlens_concept_watched_texts_total", concept="Sports") == 10


def test_tokens_queue_waits_and_stages_are_counted(start: Callable[..., Running]) -> None:
    service = start(max_batch_tokens=200)
    answer = service.ask(TEXTS, [SPORTS])
    tokens = sum(text.tokens for text in answer.texts)
    assert service.metric("neuronlens_tokens_total") == tokens
    assert service.metric("neuronlens_batch_texts_sum") == service.metric("neuronlens_queue_wait_seconds_count")
    assert service.metric("neuronlens_batch_tokens_sum") == tokens
    batches = service.metric("neuronlens_batch_texts_count")
    assert batches > 1
    padded = service.metric("neuronlens_padded_tokens_total")
    assert tokens <= padded < tokens + batches * STEP + tokens / 16, "packed texts need hardly any padding"
    for stage in ("trunk", "tail", "reply"):
        assert service.metric("neuronlens_stage_seconds_count", stage=stage) == batches
    assert service.metric("neuronlens_stage_seconds_count", stage="tokenize") == 1
    assert service.metric("neuronlens_batch_plans_sum") == batches


def test_number_of_concept_series_is_bounded(start: Callable[..., Running]) -> None:
    metrics = start().engine.metrics
    for n in range(3 * MAX_CONCEPTS):
        metrics.count(metrics.masked, {f"concept {n}": 1})
    samples = [s for s in metrics.masked.collect()[0].samples if s.name.endswith("_total")]
    assert len(samples) == MAX_CONCEPTS + 1
    assert {s.labels["concept"]: s.value for s in samples}[OTHER_CONCEPTS] == 2 * MAX_CONCEPTS
