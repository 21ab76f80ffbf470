"""Scores from logits."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from app.serving.scores import near, scores_of

LOGITS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(LOGITS)
def test_softmax_is_a_distribution_in_the_order_of_the_logits(logits: npt.NDArray[np.float32]) -> None:
    scores = scores_of(logits, "softmax")
    assert np.allclose(scores.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    assert np.array_equal(scores.max(axis=1), scores[np.arange(len(logits)), logits.argmax(axis=1)])
    ascending = np.argsort(logits, axis=1)
    assert (np.diff(np.take_along_axis(scores, ascending, axis=1), axis=1) >= 0).all()


@given(LOGITS)
def test_texts_are_scored_independently(logits: npt.NDArray[np.float32]) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        together = scores_of(logits, activation)  # type: ignore[arg-type]
        alone = [scores_of(row[None], activation)[0] for row in logits]  # type: ignore[arg-type]
        assert np.array_equal(together, np.stack(alone))


@given(LOGITS)
def test_sigmoid_is_symmetric(logits: npt.NDArray[np.float32]) -> None:
    assert np.allclose(scores_of(logits, "sigmoid") + scores_of(-logits, "sigmoid"), 1.0, rtol=0, atol=1e-15)


@given(LOGITS)
def test_activation_none_returns_the_logits(logits: npt.NDArray[np.float32]) -> None:
    assert np.array_equal(scores_of(logits, "none"), logits.astype(np.float64))


@pytest.mark.filterwarnings("error")
@given(LOGITS)
def test_scores_are_float64_and_two_dimensional(logits: npt.NDArray[np.float32]) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        scores = scores_of(logits, activation)  # type: ignore[arg-type]
        assert (scores.dtype, scores.shape) == (np.float64, logits.shape)


def test_softmax_of_known_logits() -> None:
    """Odds of 1 : 3, whatever is added to all logits."""
    for shift in (0.0, -50.0, 700.0):
        logits = np.array([[shift, shift + np.log(3.0)]])
        assert scores_of(logits, "softmax")[0] == pytest.approx([0.25, 0.75], abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_sigmoid_of_known_logits() -> None:
    """Exact up to the clip at ±700, beyond which nothing overflows and the order stays."""
    logits = np.array([[-1e30, -700.0, -699.0, -np.log(3.0), 0.0, np.log(3.0), 699.0, 700.0, 1e30]])
    scores = scores_of(logits, "sigmoid")[0]  # type: ignore[arg-type]
    assert scores[3:6] == pytest.approx([0.25, 0.5, 0.75], abs=1e-15)
    assert scores[0] == scores[1] == pytest.approx(np.exp(-700.0), rel=1e-12, abs=0)
    assert scores[2] == pytest.approx(np.exp(-699.0), rel=1e-12, abs=0)
    assert (scores[6:] == 1.0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logit_affects_only_its_text(bad: float) -> None:
    scores = scores_of(np.array([[0.0, bad], [1.0, 1.0]], np.float32), "softmax")
    assert not np.isfinite(scores[0]).all()
    assert np.array_equal(scores[1], [0.5, 0.5])


def test_distance_of_scores_is_the_most_that_any_labels_differ_by() -> None:
    even = np.array([0.25, 0.25, 0.25, 0.25])
    scores = np.array(
        [[0.28, 0.27, 0.23, 0.22], [0.28, 0.27, 0.22, 0.23], [0.31, 0.23, 0.23, 0.23], [0.19, 0.27, 0.27, 0.27]]
    )
    # together, the first two labels of the first text have 0.05 more than when even
    assert near(scores, even, "softmax", 0.0501).tolist() == [True, True, False, False]
    assert near(scores, even, "softmax", 0.0499).tolist() == [False] * 4
    assert near(scores, even, "sigmoid", 0.0499).tolist() == [True, True, False, False]
    assert near(scores, even, "sigmoid", 0.0601).tolist() == [True] * 4
    assert near(scores, even, "none", 1.0).tolist() == [False] * 4
