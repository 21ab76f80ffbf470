"""What is enforced holds: no erasure of a request makes an enforced concept more readable."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.errors import EnforcedErasure
from tests.workers.checkpoints import LABELS
from tests.workers.engine.running import TEXTS, TOLERANCE, Running, alone, random_erasures
from workers.engine.enforcing import cap_labels

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6)


def measures(logits: np.ndarray, label: int) -> list[float]:
    """The logit of a label, its log-odds against all others, and its distance to the best other one."""
    values = logits.astype(np.float64)
    others = np.delete(values, label)
    if not others.size:
        return [values[label]]
    return [values[label], values[label] - np.logaddexp.reduce(others), values[label] - others.max()]


@given(st.data())
def test_no_measure_of_an_enforced_label_rises(data: st.DataObject) -> None:
    bound = np.array(data.draw(LOGITS), np.float32)
    logits = np.array(data.draw(st.lists(st.floats(-20, 20, width=32), min_size=len(bound), max_size=len(bound))))
    logits = logits.astype(np.float32)
    labels = sorted(data.draw(st.sets(st.integers(0, len(bound) - 1))))
    found = cap_labels(logits, bound, labels)
    assert found.dtype == np.float32
    for label in labels:
        for value, limit in zip(measures(found, label), measures(bound, label), strict=True):
            assert value <= limit + 1e-4
    if found is not bound:
        free = np.setdiff1d(np.arange(len(bound)), labels)
        assert (found[free] == logits[free]).all()
        assert (found <= logits).all()


def test_a_label_is_lowered_no_further_than_it_must_be() -> None:
    alone_logits = np.array([1.0, 2.0, 0.5], np.float32)
    lower = np.array([0.0, 2.0, 0.5], np.float32)
    assert (cap_labels(lower, alone_logits, [0]) == lower).all()
    by_logit = cap_labels(np.array([3.0, 9.0, 0.5], np.float32), alone_logits, [0])
    assert by_logit == pytest.approx([1.0, 9.0, 0.5])
    raised = cap_labels(np.array([1.0, 0.0, 0.5], np.float32), alone_logits, [0])
    tight = [value - limit for value, limit in zip(measures(raised, 0), measures(alone_logits, 0), strict=True)]
    assert max(tight) == pytest.approx(0.0, abs=1e-6)
    assert (raised[1:] == [0.0, 0.5]).all()


def test_two_enforced_labels_are_both_bounded() -> None:
    """Lowering one raises the other, so each is looked at again."""
    bound = np.array([0.0, 0.0, 3.0], np.float32)
    found = cap_labels(np.array([2.0, 2.0, 0.0], np.float32), bound, [0, 1])
    assert found == pytest.approx([-3.0, -3.0, 0.0], abs=1e-4)


def test_all_labels_enforced_give_the_scores_of_the_enforced_erasures() -> None:
    bound = np.array([1.0, -1.0, 0.5], np.float32)
    found = cap_labels(np.array([0.0, 5.0, 0.0], np.float32), bound, [0, 1, 2])
    assert found - found[0] == pytest.approx(bound - bound[0], abs=1e-4)


def enforce(running: Running, *erasures: Erasure) -> None:
    running.store.set_erasures([LiveErasure(erasure=erasure, enforced=True) for erasure in erasures])
    running.mirror.refresh()


@pytest.mark.parametrize("layer", [-1, 1])
def test_random_erasures_of_a_request_never_raise_an_enforced_label(start: Callable[..., Running], layer: int) -> None:
    running, rng = start(), random.Random(layer)
    label = LABELS.index("Sports")
    n_layers = running.model.identity.n_layers
    sports = Erasure(concept="Sports", layers=(layer,))
    enforce(running, sports)
    bounds = [measures(text.logits, label) for text in running.ask(TEXTS, []).texts]
    answered = raised_without_the_cap = 0
    while answered < 12:
        requested = [erasure for erasure in random_erasures(rng) if erasure.concept != "Sports"]
        blocks = [(0,) if erasure.layers == "all" else erasure.layers for erasure in requested]
        below = any(min(at % n_layers for at in each) < layer % n_layers for each in blocks)
        if below:
            with pytest.raises(EnforcedErasure, match=r"enforced erasure of 'Sports' at block \d sees"):
                running.ask(TEXTS[:1], requested)
            continue
        answered += 1
        for text, bound in zip(running.ask(TEXTS, requested).texts, bounds, strict=True):
            assert all(
                value <= limit + TOLERANCE for value, limit in zip(measures(text.logits, label), bound, strict=True)
            )
        for asked, bound in zip(TEXTS[:4], bounds, strict=False):
            uncapped, _ = alone(running, asked, [sports, *requested])
            raised_without_the_cap += measures(uncapped, label)[1] > bound[1] + 0.01
    assert raised_without_the_cap


def test_erasures_of_a_request_may_act_at_the_enforced_block_and_above(start: Callable[..., Running]) -> None:
    running = start()
    enforce(running, Erasure(concept="Sports", layers=(0, 1)))
    above: list[tuple[int, ...]] = [(1,), (1, 2), (-1,)]
    for layers in above:
        answer = running.ask(TEXTS[:1], [Erasure(concept="World", layers=layers)])
        assert [erasure.concept for erasure in answer.erasures] == ["Sports", "World"]
    for erasure in (Erasure(concept="World", layers=(0, 2)), Erasure(concept="World", layers="all")):
        with pytest.raises(EnforcedErasure, match=r"'World' at block 0 .* 'Sports' at block 1 sees: erase at block 1"):
            running.ask(TEXTS[:1], [erasure])


@pytest.mark.parametrize("layer", [0, -1])
def test_live_erasures_never_raise_an_enforced_label_either(start: Callable[..., Running], layer: int) -> None:
    running = start()
    label = LABELS.index("Sports")
    sports = LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0), enforced=True)
    others = [
        Erasure(concept=name, method="neuron", top_fraction=0.6, layers=(layer,)) for name in ("World", "SciTech")
    ]
    running.store.set_erasures([sports])
    running.mirror.refresh()
    bounds = [measures(text.logits, label) for text in running.ask(TEXTS, None).texts]
    running.store.set_erasures([sports, *(LiveErasure(erasure=erasure) for erasure in others)])
    running.mirror.refresh()
    answer = running.ask(TEXTS, None)
    assert [erasure.concept for erasure in answer.erasures] == ["Sports", "SciTech", "World"]
    for text, bound in zip(answer.texts, bounds, strict=True):
        assert all(value <= limit + TOLERANCE for value, limit in zip(measures(text.logits, label), bound, strict=True))
