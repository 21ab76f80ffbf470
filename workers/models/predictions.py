"""From logits to predicted labels."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Activation = Literal["softmax", "sigmoid", "none"]
"""How scores follow from logits: over all labels, for each label by itself, or unchanged (regression)."""

Head = Activation | Literal["greedy"]
"""How the logits of a model are read: by their activation, or as those of greedy decoding (a softmax with ties)."""

CHANCE = 0.05
"""Scores this near to those of a text without information are at chance."""

NO_LABEL = -1
"""Stands for a label's index where the model predicts none."""


def activation_of(problem_type: str | None, n_labels: int) -> Activation:
    """The activation that transformers' text-classification pipeline uses for such a config."""
    if problem_type == "regression":
        return "none"
    return "sigmoid" if problem_type == "multi_label_classification" or n_labels == 1 else "softmax"


def no_better_than_chance(accuracy: float, largest_share: float, texts: int) -> bool:
    """Whether an accuracy is within two standard errors of always predicting the most frequent label.

    Args:
        accuracy: on `texts` texts, of which `largest_share` have the most frequent label.
    """
    margin = 2.0 * (largest_share * (1.0 - largest_share) / texts) ** 0.5
    return accuracy <= largest_share + margin and accuracy < 1.0


def predicted_labels(logits: npt.NDArray[np.float32], head: Head) -> npt.NDArray[np.int16]:
    """Index of the label with the highest logit, the first of equal ones, or NO_LABEL.

    A single label is predicted if its score is above one half. Greedy decoding predicts none if the best logits are
    equal.

    Args:
        logits: [..., K].
    """
    best: npt.NDArray[Any] = logits.argmax(axis=-1)
    if head == "greedy":
        tied = (logits == logits.max(axis=-1, keepdims=True)).sum(axis=-1) > 1
        best = np.where(tied, NO_LABEL, best)
    elif head == "sigmoid" and logits.shape[-1] == 1:
        best = np.where(logits[..., 0] > 0, best, NO_LABEL)
    return best.astype(np.int16)
