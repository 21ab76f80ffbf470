"""Exact streaming moments in float64, merged by Pébay's formulas.

Every variable is counted from a *shift*, one of its own first values. States are float32 or narrower, so the
difference to the shift is exact in float64, and a mean far larger than the deviation costs no precision: the error of
the r-th central moment stays below 1e-12·σ^r for any mean.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of `count` observations of variables of any shape S. All arrays have shape S.

    Attributes:
        shift: a value of the variable. relative_mean: mean of the differences to the shift.
        m2, m3, m4: sums of powers of the deviations from the mean. total_abs: sum of absolute values.

    A variable that ever was NaN or infinite has NaN in all of them.
    """

    count: int
    shift: Floats
    relative_mean: Floats
    m2: Floats
    m3: Floats
    m4: Floats
    total_abs: Floats
    minimum: Floats
    maximum: Floats

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Moments":
        """No observations: the identity of `merge`."""
        zero = np.zeros(shape)
        return cls(0, zero, zero, zero, zero, zero, zero, np.full(shape, np.inf), np.full(shape, -np.inf))

    @classmethod
    def of(cls, states: npt.NDArray[np.floating]) -> "Moments":
        """Moments of states [n, *S], n ≥ 0."""
        if not len(states):
            return cls.empty(states.shape[1:])
        values = states.astype(np.float64)
        values[:, ~np.isfinite(values).all(axis=0)] = np.nan
        shift = values[0].copy()
        apart = values - shift
        mean = apart.mean(axis=0)
        mean = mean + (apart - mean).mean(axis=0)  # a second pass removes the rounding error of the first
        deviation = apart - mean
        square = deviation * deviation
        return cls(
            len(states),
            shift,
            mean,
            square.sum(axis=0),
            (square * deviation).sum(axis=0),
            (square * square).sum(axis=0),
            np.abs(values).sum(axis=0),
            values.min(axis=0),
            values.max(axis=0),
        )

    @classmethod
    def from_central(cls, count: int, mean: Floats, std: Floats, m3: Floats, m4: Floats) -> "Moments":
        """Moments from the third and fourth central moment; absolute values and extremes are unknown (NaN)."""
        unknown = np.full_like(mean, np.nan)
        sums = (std**2 * count, m3 * count, m4 * count)
        return cls(count, mean, np.zeros_like(mean), *sums, unknown, unknown, unknown)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both groups of observations together (Pébay 2008, eqs. 2.1, 3.1)."""
        if not self.count:
            return other
        if not other.count:
            return self
        na, nb = self.count, other.count
        n = na + nb
        # shifts are observations: their difference is exact, and that of the means is of the size of σ
        delta = (other.shift - self.shift) + (other.relative_mean - self.relative_mean)
        step = delta / n
        m2 = self.m2 + other.m2 + delta * step * na * nb
        m3 = (
            self.m3 + other.m3 + delta * step * step * na * nb * (na - nb) + 3.0 * step * (na * other.m2 - nb * self.m2)
        )
        m4 = (
            self.m4
            + other.m4
            + delta * step**3 * na * nb * (na * na - na * nb + nb * nb)
            + 6.0 * step * step * (na * na * other.m2 + nb * nb * self.m2)
            + 4.0 * step * (na * other.m3 - nb * self.m3)
        )
        return Moments(
            n,
            self.shift,
            self.relative_mean + nb * step,
            m2,
            m3,
            m4,
            self.total_abs + other.total_abs,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )

    @property
    def mean(self) -> Floats:
        return self.shift + self.relative_mean

    @property
    def std(self) -> Floats:
        """Standard deviation with ddof 0."""
        return np.sqrt(self.central(2))

    @property
    def mean_abs(self) -> Floats:
        return self.total_abs / max(self.count, 1)

    def central(self, power: int) -> Floats:
        """Central moment of power 2, 3 or 4."""
        total: Floats = {2: self.m2, 3: self.m3, 4: self.m4}[power]
        return total / max(self.count, 1)
