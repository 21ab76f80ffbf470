"""A result is at chance where what was erased left nothing of the text in its scores."""

from dataclasses import replace

import numpy as np
import pytest

from app.serving.classification import at_chance
from app.serving.service import ModelFacts, TextAnswer
from range_store.domain.erasure import Erasure
from range_store.domain.range_set import ModelIdentity

IDENTITY = ModelIdentity(
    id="m", revision=None, kind="sequence-classification", family="bert", fingerprint="0" * 64,
    labels=("a", "b", "c", "d"), n_layers=2, hidden_size=10,
)  # fmt: skip
EMPTY = (1.0, 0.0, 0.0, 2.0)
MODEL = ModelFacts(IDENTITY, None, "float32", "cpu", "m", 512, True, empty_logits=((0.0, 0.0, 9.0, 0.0), EMPTY))
LAST = (Erasure(concept="a", layers=(-1,)),)


def text(logits: tuple[float, ...], masked: int) -> TextAnswer:
    return TextAnswer(np.array(logits, dtype=np.float32), None, masked, False, 3)


@pytest.mark.parametrize(
    ("logits", "masked", "expected"),
    [
        ((0.3, 0.3, 0.3, 0.3), 1, True),
        ((0.3, 0.3, 0.3, 0.35), 1, True),
        ((0.3, 0.3, 0.3, 0.3), 0, False),  # nothing of it was erased: so the model is
        ((0.3, 0.3, 0.3, 0.9), 10, False),
        (EMPTY, 10, True),
        ((1.1, 0.0, 0.0, 2.0), 5, True),
        (EMPTY, 4, False),  # the text has these scores by itself
        ((1.5, 0.0, 0.0, 2.0), 10, False),
        ((0.0, 0.0, 9.0, 0.0), 10, False),  # those of another block
    ],
)
def test_scores_are_even_or_those_of_an_empty_state(logits: tuple[float, ...], masked: int, expected: bool) -> None:
    assert at_chance([text(logits, masked), text((9.0, 0.0, 0.0, 0.0), 10)], LAST, MODEL) == [expected, False]


def test_the_last_erased_block_says_which_state_is_empty() -> None:
    both = (Erasure(concept="a", layers=(0,)), Erasure(concept="b", layers=(0, 1)))
    assert at_chance([text(EMPTY, 10), text(EMPTY, 9)], both, MODEL) == [True, False], (
        "half of the neurons of two blocks"
    )
    assert at_chance([text((0.0, 0.0, 9.0, 0.0), 5)], both[:1], MODEL) == [True]


def test_each_label_of_a_sigmoid_is_even_by_itself_and_values_never_are() -> None:
    several = replace(MODEL, problem_type="multi_label_classification")
    assert at_chance([text((0.1, -0.1, 0.0, 0.0), 1), text((0.3, 0.0, 0.0, 0.0), 1)], LAST, several) == [True, False]
    values = replace(MODEL, problem_type="regression")
    assert at_chance([text((0.25, 0.25, 0.25, 0.25), 10), text(EMPTY, 10)], LAST, values) == [False, False]
    few_shot = replace(MODEL, empty_logits=())
    assert at_chance([text(EMPTY, 10), text((0.0, 0.0, 0.0, 0.0), 10)], LAST, few_shot) == [False, True]


def test_no_state_is_emptied_where_erasures_act_within_blocks() -> None:
    both = [text(EMPTY, 10), text((0.0, 0.0, 0.0, 0.0), 10)]
    assert at_chance(both, LAST, MODEL, within_blocks=True) == [False, True]
