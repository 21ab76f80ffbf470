"""What logits say of a text's label."""

import numpy as np
import pytest

from workers.models.predictions import NO_LABEL, Activation, Head, activation_of, predicted_labels


@pytest.mark.parametrize(
    ("problem_type", "n_labels", "activation"),
    [
        (None, 1, "sigmoid"),
        (None, 2, "softmax"),
        ("single_label_classification", 2, "softmax"),
        ("multi_label_classification", 1, "sigmoid"),
        ("multi_label_classification", 3, "sigmoid"),
        ("regression", 1, "none"),
        ("regression", 3, "none"),
    ],
)
def test_activation_is_that_of_transformers_pipeline(
    problem_type: str | None, n_labels: int, activation: Activation
) -> None:
    assert activation_of(problem_type, n_labels) == activation


@pytest.mark.parametrize(
    ("head", "logits", "predicted"),
    [
        ("softmax", [-1.0, 2.0, 2.0], 1),
        ("greedy", [-1.0, 2.0, 2.0], NO_LABEL),
        ("greedy", [-1.0, -1.0, 2.0], 2),
        ("sigmoid", [-3.0, -1.0, -2.0], 1),
        ("sigmoid", [0.1], 0),
        ("sigmoid", [0.0], NO_LABEL),
        ("softmax", [-5.0], 0),
        ("none", [-5.0], 0),
    ],
)
def test_predicted_label(head: Head, logits: list[float], predicted: int) -> None:
    found = predicted_labels(np.array([logits, logits], dtype=np.float32), head)
    assert (found.tolist(), found.dtype) == ([predicted, predicted], np.int16)
