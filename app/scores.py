"""From logits to scores."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Activation = Literal["softmax", "sigmoid", "none"]


def scores_of(logits: npt.NDArray[np.float32], activation: Activation) -> npt.NDArray[np.float64]:
    """Scores [K] of logits [K], computed in float64; "none" gives the logits themselves."""
    values = logits.astype(np.float64)
    match activation:
        case "softmax":
            odds = np.exp(values - values.max())
            return np.asarray(odds / odds.sum())
        case "sigmoid":
            return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -700, 700))))
        case "none":
            return values
