"""Acc, Conf, CAcc, CConf and further measures (docs/method.md, "Measures") from the outcome of every test text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Damp, Erasure
from workers.evaluation.bootstrap import Bootstrap
from workers.evaluation.settings import Others
from workers.fitting.checkpoint import Arrays
from workers.models.predictions import CHANCE, NO_LABEL, Head, predicted_labels

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int16]
NEARLY_ALL = 0.99
"""Share of the texts that must get the same answer for a result to be at chance."""
MEAN = "mean"
"""Target of the row that averages over the targets, unweighted."""


@dataclass(eq=False)
class Outcomes:
    """The model's answers to N texts, unmasked and under E erasures. There are K labels.

    Attributes:
        base_predicted [N], predicted [E, N]: index of the label, or NO_LABEL.
        base_confidence [N], confidence [E, N]: probability of the true label.
        kl [E, N]: KL divergence of the masked from the unmasked output, in nats.
        done [N]: whether the text's batch is measured. used [N]: whether the text counts.
        turns [1]: number of turns of erasures that are done for the batch that is under way.
        head: how the model's logits are read.
    """

    base_predicted: Labels
    base_confidence: npt.NDArray[np.float32]
    predicted: Labels
    confidence: npt.NDArray[np.float32]
    kl: npt.NDArray[np.float32]
    done: npt.NDArray[np.bool_]
    used: npt.NDArray[np.bool_]
    turns: npt.NDArray[np.int64]
    head: Head = "softmax"

    @classmethod
    def empty(cls, erasures: int, texts: int, head: Head = "softmax") -> "Outcomes":
        shape = (erasures, texts)
        return cls(
            np.zeros(texts, np.int16),
            np.zeros(texts, np.float32),
            np.zeros(shape, np.int16),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros(texts, np.bool_),
            np.zeros(texts, np.bool_),
            np.zeros(1, np.int64),
            head,
        )

    def arrays(self) -> Arrays:
        """Everything but the head as arrays, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "head"}

    def restored(self, arrays: Arrays) -> "Outcomes":
        """What `arrays` gave. Raises KeyError or ValueError if it is not of as many texts and erasures as these."""
        found = Outcomes(**{name: arrays[name].copy() for name in self.arrays()}, head=self.head)
        if found.kl.shape != self.kl.shape:
            raise ValueError("other numbers of texts or erasures")
        return found

    def add_base(self, at: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], truth: Labels) -> Floats:
        """Store the unmasked model's logits [B, K] of texts `at`. Returns their `log_probabilities`."""
        log = log_probabilities(logits, self.head)
        self.base_predicted[at] = predicted_labels(logits, self.head)
        self.base_confidence[at] = np.exp(log[np.arange(len(at)), truth])
        return log

    def add(
        self,
        erasures: npt.NDArray[np.int64],
        at: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
        base: Floats,
        truth: Labels,
    ) -> None:
        """Store the masked logits [P, B, K] of texts `at` under the erasures `erasures`.

        Args:
            base: `log_probabilities` of the unmasked model.
            truth: index of each text's true label, [B].
        """
        log = log_probabilities(logits, self.head)
        cells = np.ix_(erasures, at)
        self.predicted[cells] = predicted_labels(logits, self.head)
        self.confidence[cells] = np.exp(log[:, np.arange(len(at)), truth])
        self.kl[cells] = (np.exp(base) * (base - log)).sum(axis=-1)


def log_probabilities(logits: npt.NDArray[np.float32], head: Head) -> Floats:
    """Log-probabilities of K labels in float64.

    Of a softmax, [..., K]. Of a sigmoid, [..., 2K]: that each label applies, then that it does not, so that a KL
    divergence is the sum of those of the labels.
    """
    values = logits.astype(np.float64)
    if head == "sigmoid":
        found: Floats = -np.logaddexp(0.0, np.concatenate([-values, values], axis=-1))
        return found
    shifted = values - values.max(axis=-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


@dataclass(frozen=True)
class Row:
    """The measures of one setting and target. Field names are those of results.json and results.csv.

    Attributes:
        layer: a block, or several that are masked jointly, such as "4+5".
        base_acc, base_conf: accuracy and confidence of the unmasked model on the target's texts; base_cacc, base_cconf:
            on all others. delta_…: masked minus unmasked; …_low, …_high: bootstrap interval.
        kl_target, kl_others: mean KL divergence of the masked from the unmasked output, in nats.
        unchanged_others: share of the other texts whose prediction does not change.
        worst_other, worst_other_delta_acc: the other class whose accuracy falls most, and its change.
        at_chance: nearly all texts get one label, or even scores, though they are of several classes.
        destinations: number of the target's texts that get each label when masked; "" is no label.
        base_perplexity, perplexity: of the test texts, unmasked and masked, if measured.
    """

    layer: int | str
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
    replacement: str = "zero"
    positions: str = "all"
    delta_acc_low: float = np.nan
    delta_acc_high: float = np.nan
    delta_conf_low: float = np.nan
    delta_conf_high: float = np.nan
    delta_cacc_low: float = np.nan
    delta_cacc_high: float = np.nan
    delta_cconf_low: float = np.nan
    delta_cconf_high: float = np.nan
    kl_target: float = np.nan
    kl_others: float = np.nan
    unchanged_others: float = np.nan
    worst_other: str | None = None
    worst_other_delta_acc: float = np.nan
    at_chance: bool = False
    base_perplexity: float | None = None
    perplexity: float | None = None
    destinations: dict[str, int] = field(default_factory=dict)

    @property
    def setting(self) -> tuple[int | str, str, str, float | None, float, str, str]:
        """What rows of the same setting share: (layer, ranking, method, τ, top_fraction, replacement, positions)."""
        return self.layer, self.ranking, self.method, self.tau, self.top_fraction, self.replacement, self.positions

    @property
    def score(self) -> float:
        """What the target loses in accuracy, less what the others lose."""
        return self.delta_cacc - self.delta_acc

    def as_json(self) -> dict[str, Any]:
        """The row with null instead of NaN, which JSON does not have."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


CSV_COLUMNS = tuple(each.name for each in fields(Row) if each.name != "destinations")
"""Columns of results.csv: all fields with a single value."""
_AVERAGED = tuple(
    each.name
    for each in fields(Row)
    if each.type is float
    and each.name not in ("top_fraction", "worst_other_delta_acc")
    and not each.name.endswith(("_low", "_high"))
)


def replacement_name(replacement: str | Damp) -> str:
    """A replacement as it is written on the command line."""
    return replacement if isinstance(replacement, str) else f"damp:{replacement.damp:g}"


def layer_name(layers: tuple[int, ...]) -> int | str:
    """The number of a block, or several that are masked jointly as "4+5"."""
    return layers[0] if len(layers) == 1 else "+".join(map(str, layers))


_DELTAS = ("delta_acc", "delta_conf", "delta_cacc", "delta_cconf")


class Summary:
    """Computes rows from the outcomes of the texts.

    Args:
        truth: index of the true label of each text, [N]. labels: K names.
        bootstrap: over the texts that count.
        others: whether CAcc and CConf pool all other texts, or average over the other classes, unweighted.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        truth: Labels,
        labels: tuple[str, ...],
        bootstrap: Bootstrap,
        others: Others = "pooled",
    ) -> None:
        self._by_class = others == "classes"
        used = outcomes.used
        self._outcomes = outcomes
        self._used = used
        self._truth = truth[used]
        self._labels = labels
        self._bootstrap = bootstrap
        self._base_predicted, self._base_confidence = outcomes.base_predicted[used], outcomes.base_confidence[used]
        self._was_right = self._base_predicted == self._truth
        self._per_class = np.bincount(self._truth, minlength=len(labels))

    def rows(self, erasures: Sequence[Erasure], first: int, positions: str) -> list[Row]:
        """The rows of one setting's targets, followed by their mean row.

        Args:
            erasures: one per target, equal except for the concept, with resolved layers. A concept that is no label of
                the model has no texts of its own: all texts are others.
            first: index of the first of them among the outcomes.
        """
        measured = [self._row(erasure, first + number, positions) for number, erasure in enumerate(erasures)]
        rows = [row for row, _ in measured]
        return [*rows, _mean_row(rows, [replicas for _, replicas in measured], self._bootstrap)]

    def _mean_of_classes(self, values: npt.NDArray[Any], chosen: npt.NDArray[np.bool_]) -> float:
        """Unweighted mean over the classes of the chosen texts; NaN if there are none."""
        means = [_mean_of(values, chosen & (self._truth == c)) for c in np.unique(self._truth[chosen])]
        return float(np.mean(means)) if means else float("nan")

    def _at_chance(self, index: int) -> bool:
        """Whether the answers under an erasure hardly depend on the texts, though these are of several classes."""
        if np.count_nonzero(self._per_class) < 2:
            return False
        predicted = self._outcomes.predicted[index, self._used].astype(np.int64)
        one_label = np.bincount(predicted - NO_LABEL).max() / len(predicted)
        if self._outcomes.head == "greedy":  # its scores are not probabilities
            return bool(one_label >= NEARLY_ALL)
        even = 1 / len(self._labels) if self._outcomes.head == "softmax" else 0.5
        confidence = self._outcomes.confidence[index, self._used].astype(np.float64)
        return bool(max(one_label, np.mean(np.abs(confidence - even) <= CHANCE)) >= NEARLY_ALL)

    def _row(self, erasure: Erasure, index: int, positions: str) -> tuple[Row, Floats]:
        """The row of one erasure, and the bootstrap replicas of its four deltas, [4, R]."""
        target = self._labels.index(erasure.concept) if erasure.concept in self._labels else NO_LABEL
        truth, was_right = self._truth, self._was_right
        own = truth == target
        predicted = self._outcomes.predicted[index, self._used]
        acc_change = (predicted == truth).astype(np.float64) - was_right
        conf_change = self._outcomes.confidence[index, self._used].astype(np.float64) - self._base_confidence
        resampled = self._bootstrap.means(np.stack([acc_change, conf_change]), target, self._by_class)
        replicas = np.concatenate([resampled[:, 0], resampled[:, 1]])
        of_others = self._mean_of_classes if self._by_class else _mean_of
        sides = ((_mean_of, own), (of_others, ~own))
        deltas = [mean(change, chosen) for mean, chosen in sides for change in (acc_change, conf_change)]
        by_class = [
            (float(acc_change[truth == c].mean()), label)
            for c, label in enumerate(self._labels)
            if c != target and self._per_class[c]
        ]
        worst, worst_label = min(by_class, default=(float("nan"), None))
        reached = predicted[own]
        kl = self._outcomes.kl[index, self._used]
        assert isinstance(erasure.layers, tuple)
        row = Row(
            layer=layer_name(erasure.layers),
            ranking=erasure.ranking,
            method=erasure.method,
            tau=None if erasure.method == "neuron" else erasure.tau,
            top_fraction=erasure.top_fraction,
            replacement=replacement_name(erasure.replacement),
            positions=positions,
            target=erasure.concept,
            n_target=int(own.sum()),
            n_others=int((~own).sum()),
            base_acc=_mean_of(was_right, own),
            base_conf=_mean_of(self._base_confidence, own),
            base_cacc=of_others(was_right, ~own),
            base_cconf=of_others(self._base_confidence, ~own),
            **dict(zip(_DELTAS, deltas, strict=True)),
            **_interval(self._bootstrap, replicas),
            kl_target=_mean_of(kl, own),
            kl_others=_mean_of(kl, ~own),
            unchanged_others=_mean_of(predicted == self._base_predicted, ~own),
            worst_other=worst_label,
            worst_other_delta_acc=worst,
            at_chance=self._at_chance(index),
            destinations={
                ("" if c == NO_LABEL else self._labels[c]): int((reached == c).sum())
                for c in (*range(len(self._labels)), NO_LABEL)
                if (reached == c).any()
            },
        )
        return row, replicas


def _interval(bootstrap: Bootstrap, replicas: Floats) -> dict[str, float]:
    low, high = bootstrap.interval(replicas)
    return {f"{name}_low": float(low[n]) for n, name in enumerate(_DELTAS)} | {
        f"{name}_high": float(high[n]) for n, name in enumerate(_DELTAS)
    }


def _mean_row(rows: list[Row], replicas: list[Floats], bootstrap: Bootstrap) -> Row:
    """The unweighted mean over targets.

    Targets without texts do not count. If no target has texts, the means of the others remain.
    """
    counted = [index for index, row in enumerate(rows) if row.n_target] or list(range(len(rows)))
    values: dict[str, Any] = {name: float(np.mean([getattr(rows[i], name) for i in counted])) for name in _AVERAGED}
    values |= _interval(bootstrap, np.mean([replicas[index] for index in counted], axis=0))
    losers = [rows[i] for i in counted if rows[i].worst_other]
    worst = min(losers, key=lambda row: row.worst_other_delta_acc, default=None)
    return replace(
        rows[0],
        target=MEAN,
        n_target=sum(row.n_target for row in rows),
        n_others=sum(row.n_others for row in rows),
        worst_other=worst.worst_other if worst else None,
        worst_other_delta_acc=worst.worst_other_delta_acc if worst else float("nan"),
        at_chance=all(rows[i].at_chance for i in counted),
        destinations={},
        **values,
    )


def _mean_of(values: npt.NDArray[Any], chosen: npt.NDArray[np.bool_]) -> float:
    """Mean over the chosen texts; NaN if there are none."""
    return float(values[chosen].mean(dtype=np.float64)) if chosen.any() else float("nan")
