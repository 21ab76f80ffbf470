"""Scores from logits."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from app.scores import scores_of

LOGITS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(LOGITS)
def test_softmax_is_a_distribution_that_keeps_the_order(logits: npt.NDArray[np.float32]) -> None:
    scores = scores_of(logits, "softmax")
    assert np.allclose(scores.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    assert np.array_equal(scores.max(axis=1), scores[np.arange(len(logits)), logits.argmax(axis=1)])
    ascending = np.argsort(logits, axis=1)
    assert (np.diff(np.take_along_axis(scores, ascending, axis=1), axis=1) >= 0).all()


@given(LOGITS)
def test_every_text_is_scored_by_itself(logits: npt.NDArray[np.float32]) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        together = scores_of(logits, activation)  # type: ignore[arg-type]
        alone = [scores_of(row[None], activation)[0] for row in logits]  # type: ignore[arg-type]
        assert np.array_equal(together, np.stack(alone))


@given(LOGITS)
def test_sigmoid_is_symmetric_and_none_changes_nothing(logits: npt.NDArray[np.float32]) -> None:
    assert np.allclose(scores_of(logits, "sigmoid") + scores_of(-logits, "sigmoid"), 1.0, rtol=0, atol=1e-15)
    assert np.array_equal(scores_of(logits, "none"), logits.astype(np.float64))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_visible_and_with_its_text(bad: float) -> None:
    scores = scores_of(np.array([[0.0, bad], [1.0, 1.0]], np.float32), "softmax")
    assert not np.isfinite(scores[0]).all()
    assert np.array_equal(scores[1], [0.5, 0.5])
