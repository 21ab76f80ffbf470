"""Acc, Conf, CAcc and CConf, as METHOD "Measures" defines them, from streamed predictions."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from range_store.erasure import Erasure

Floats = npt.NDArray[np.float64]
_MEASURES = (
    "base_acc",
    "base_conf",
    "base_cacc",
    "base_cconf",
    "delta_acc",
    "delta_conf",
    "delta_cacc",
    "delta_cconf",
)
MEAN = "mean"
"""Target name of the row that averages over the targets, unweighted."""


class ClassSums:
    """Per true class: texts, right answers, and the sum of the probability given to the true label.

    Args:
        n_labels: K, the model's labels.
    """

    def __init__(self, n_labels: int) -> None:
        self.texts = np.zeros(n_labels, dtype=np.int64)
        self.right = np.zeros(n_labels, dtype=np.int64)
        self.confidence = np.zeros(n_labels, dtype=np.float64)

    def add(self, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """Count a batch. logits: [B, K]; labels: true label indices, [B]."""
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        probabilities = np.exp(shifted)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        np.add.at(self.texts, labels, 1)
        np.add.at(self.right, labels, logits.argmax(axis=1) == labels)
        np.add.at(self.confidence, labels, probabilities[np.arange(len(labels)), labels])

    def accuracy(self, classes: npt.NDArray[np.bool_]) -> float:
        """Share of right answers over all texts of `classes`, pooled; NaN if there are none."""
        return _ratio(self.right[classes].sum(), self.texts[classes].sum())

    def mean_confidence(self, classes: npt.NDArray[np.bool_]) -> float:
        """Mean probability of the true label over all texts of `classes`, pooled; NaN if there are none."""
        return _ratio(self.confidence[classes].sum(), self.texts[classes].sum())


def _ratio(total: float, count: int) -> float:
    return float(total / count) if count else float("nan")


@dataclass(frozen=True)
class Row:
    """One setting and target: the unmasked model, and what masking changed. Field names are the file format's.

    Acc and Conf are over the target's texts, CAcc and CConf over all others; deltas are masked minus unmasked.
    """

    layer: int
    ranking: str
    method: str
    tau: float | None
    top_fraction: float
    target: str
    n_target: int
    n_others: int
    base_acc: float
    base_conf: float
    base_cacc: float
    base_cconf: float
    delta_acc: float
    delta_conf: float
    delta_cacc: float
    delta_cconf: float

    def as_json(self) -> dict[str, Any]:
        """The row with NaN, which JSON has no word for, as null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def row_of(layer: int, erasure: Erasure, target: int, base: ClassSums, masked: ClassSums) -> Row:
    """The row of one erasure whose concept is label `target`."""
    own = np.arange(len(base.texts)) == target
    tau = None if erasure.method == "neuron" else erasure.tau
    return Row(
        layer=layer,
        ranking=erasure.ranking,
        method=erasure.method,
        tau=tau,
        top_fraction=erasure.top_fraction,
        target=erasure.concept,
        n_target=int(base.texts[own].sum()),
        n_others=int(base.texts[~own].sum()),
        base_acc=base.accuracy(own),
        base_conf=base.mean_confidence(own),
        base_cacc=base.accuracy(~own),
        base_cconf=base.mean_confidence(~own),
        delta_acc=masked.accuracy(own) - base.accuracy(own),
        delta_conf=masked.mean_confidence(own) - base.mean_confidence(own),
        delta_cacc=masked.accuracy(~own) - base.accuracy(~own),
        delta_cconf=masked.mean_confidence(~own) - base.mean_confidence(~own),
    )


def mean_row(rows: list[Row]) -> Row:
    """The unweighted mean over targets of rows that share their setting; targets without texts do not count."""
    some = [row for row in rows if row.n_target]
    first = rows[0]
    means = {name: float(np.mean([getattr(row, name) for row in some])) if some else float("nan") for name in _MEASURES}
    return Row(
        layer=first.layer,
        ranking=first.ranking,
        method=first.method,
        tau=first.tau,
        top_fraction=first.top_fraction,
        target=MEAN,
        n_target=sum(row.n_target for row in rows),
        n_others=sum(row.n_others for row in rows),
        **means,
    )
