"""Bootstrap intervals of means over texts: resampled within each true class, with the same resamples for all settings.

`scipy.stats.bootstrap` has neither strata nor resamples that several statistics share.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Bootstrap:
    """R resamples of N texts, drawn once by a seed.

    Texts are drawn within their true class, so every resample has the class sizes of the test set. All settings use the
    same resamples, so differences between settings are paired, and deltas are paired by text.

    Args:
        truth: index of the true label of each text, [N].
        resamples: R; 0 gives NaN intervals.
        level: coverage of the percentile interval.
    """

    def __init__(self, truth: npt.NDArray[np.int16], resamples: int = 1000, seed: int = 0, level: float = 0.95) -> None:
        self.resamples, self.level = resamples, level
        self._truth = truth
        self._weights: dict[int, npt.NDArray[np.float32]] = {}
        rng = np.random.default_rng(seed)
        for label in np.unique(truth):
            n = int((truth == label).sum())
            self._weights[int(label)] = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)

    def means(self, values: Floats, target: int, per_class: bool = False) -> Floats:
        """Resampled means of `values` [M, N] over the target's texts and over all others, [M, 2, R]; NaN if none.

        Args:
            per_class: average the others over their classes, unweighted, instead of over all their texts.
        """
        sums = np.zeros((len(values), 2, self.resamples))
        counts = np.zeros(2)
        for label, weights in self._weights.items():
            own = self._truth == label
            side = int(label != target)
            texts = float(own.sum())
            share = 1 / texts if per_class and side else 1.0
            sums[:, side] += share * (values[:, own].astype(np.float32) @ weights.T)
            counts[side] += share * texts
        with np.errstate(divide="ignore", invalid="ignore"):
            means: Floats = sums / counts[:, None]
        return means

    def interval(self, replicas: Floats) -> tuple[Floats, Floats]:
        """Percentile interval of replicas [M, R]: low [M], high [M]."""
        if not self.resamples:
            nan = np.full(len(replicas), np.nan)
            return nan, nan
        outside = 100 * (1 - self.level) / 2
        low, high = np.percentile(replicas, [outside, 100 - outside], axis=1)
        return low, high
