"""The `probe` ranking: weights of a linear classifier from states to concepts (paper §3.2; Dalvi et al. 2019).

scikit-learn trains it once, in one process, on a seeded sample of states, with an elastic-net penalty.
"""

import logging
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from range_store.domain.range_set import ProbeSettings

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]


class ProbeSample:
    """States [S, L, D] of S rows of the corpus, which may be added in any order.

    Args:
        rows: indices of the S rows, ascending. n_layers: L. hidden: D.
    """

    def __init__(self, rows: npt.NDArray[np.int64], n_layers: int, hidden: int) -> None:
        self.rows = rows
        self.states = np.zeros((len(rows), n_layers, hidden), dtype=np.float32)
        self.concept = np.full(len(rows), -1, dtype=np.int64)
        """Index of each row's concept; -1 for a row that was not added, or does not count."""

    @classmethod
    def draw(cls, rows: int, n_layers: int, hidden: int, settings: ProbeSettings) -> "ProbeSample":
        """An empty sample of rows, drawn from a corpus of `rows` rows by the seed of the settings."""
        size = min(rows, settings.rows)
        indices = np.random.default_rng(settings.seed).choice(rows, size=size, replace=False)
        return cls(np.sort(indices), n_layers, hidden)

    def between(self, first: int, end: int) -> "ProbeSample":
        """An empty sample of those of its rows with `first` <= index < `end`."""
        start, stop = np.searchsorted(self.rows, (first, end))
        return ProbeSample(self.rows[start:stop], *self.states.shape[1:])

    def merge(self, part: "ProbeSample") -> None:
        """Add the states of a sample that `between` made."""
        at = np.searchsorted(self.rows, part.rows)
        self.states[at], self.concept[at] = part.states, part.concept

    def update(self, first: int, states: npt.NDArray[np.float32], concept: npt.NDArray[np.int64]) -> None:
        """Add those of the rows `first`, `first` + 1, … that are in the sample. states: [n, L, D]; concept: [n]."""
        start, end = np.searchsorted(self.rows, (first, first + len(states)))
        at = self.rows[start:end] - first
        self.states[start:end], self.concept[start:end] = states[at], concept[at]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The sample as arrays, for a checkpoint."""
        return {"probe.states": self.states, "probe.concept": self.concept}

    def restore(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from `arrays`. Raises KeyError or ValueError if they are of another sample."""
        if arrays["probe.states"].shape != self.states.shape:
            raise ValueError("a probe sample of another shape")
        self.states, self.concept = arrays["probe.states"].copy(), arrays["probe.concept"].copy()


def probe_saliency(
    sample: ProbeSample, layer: int, concepts: tuple[str, ...], order: tuple[str, ...], settings: ProbeSettings
) -> Floats:
    """|W| [C, D] of a multinomial logistic regression on the sample's standardised states of one layer.

    Minimises mean log loss + l1·Σ|w| + l2·Σw². Two concepts share one row of weights. A neuron that is constant or not
    finite in the sample has weight 0.

    Args:
        concepts: the C concepts to train on. order: all concepts, as the sample numbers them.
    """
    number = {concept: index for index, concept in enumerate(order)}
    indices = [number[concept] for concept in concepts]
    chosen = np.isin(sample.concept, indices)
    states, concept = sample.states[chosen, layer].astype(np.float64), sample.concept[chosen]
    weights = np.zeros((len(concepts), states.shape[1]))
    present = [index for index in indices if (concept == index).any()]
    if len(present) < 2:
        return weights
    mean, std = states.mean(axis=0), states.std(axis=0)
    usable = np.isfinite(std) & (std > 0)
    scaled = (states[:, usable] - mean[usable]) / std[usable]
    total = settings.l1 + 2 * settings.l2
    model = LogisticRegression(
        C=1 / (len(scaled) * total) if total else np.inf,
        l1_ratio=settings.l1 / total if total else 0.0,
        solver="saga",
        max_iter=settings.iterations,
        tol=1e-3,
        random_state=settings.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model.fit(scaled, concept)
        except ConvergenceWarning:
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(scaled, concept)
            logger.warning("the probe of layer %d did not converge within %d iterations", layer, settings.iterations)
    found = np.abs(model.coef_) if len(model.classes_) > 2 else np.repeat(np.abs(model.coef_), 2, axis=0)
    for row, index in enumerate(model.classes_):
        weights[indices.index(int(index)), usable] = found[row]
    return weights
