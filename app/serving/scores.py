"""From logits to scores."""

import numpy as np
import numpy.typing as npt

from app.serving.service import Activation


def scores_of(logits: npt.NDArray[np.float32], activation: Activation) -> npt.NDArray[np.float64]:
    """Scores [N, K] of the logits [N, K] of N texts, computed in float64; "none" gives the logits themselves.

    A logit that is not a number makes all softmax scores of its text NaN; nothing is raised here.
    """
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        match activation:
            case "softmax":
                odds = np.exp(values - values.max(axis=-1, keepdims=True))
                return np.asarray(odds / odds.sum(axis=-1, keepdims=True))
            case "sigmoid":
                return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -700, 700))))
            case "none":
                return values


def near(
    scores: npt.NDArray[np.float64], other: npt.NDArray[np.float64], activation: Activation, within: float
) -> npt.NDArray[np.bool_]:
    """Whether each text's scores [N, K] are `within` a distance of other scores [K]; never for logits ("none").

    For softmax the distance is the total variation: the largest difference in probability of any set of labels. For
    sigmoid it is the largest difference of one label.
    """
    if activation == "none":
        return np.zeros(len(scores), dtype=np.bool_)
    apart = np.abs(scores - other)
    return np.asarray((apart.sum(axis=-1) / 2 if activation == "softmax" else apart.max(axis=-1)) <= within)
