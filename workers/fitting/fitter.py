"""Running statistics of every layer, concept and neuron, and the arrays of a range set that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Ranking
from range_store.domain.range_set import InspectLayer, ProbeSettings, ServeLayer
from range_store.domain.rankings import saliency
from workers.fitting.histograms import count, edges_from
from workers.fitting.moments import Moments
from workers.fitting.probe import ProbeSample, probe_saliency

_MOMENTS = tuple(field.name for field in fields(Moments) if field.name != "count")


@dataclass(frozen=True, eq=False)
class Part:
    """Statistics of consecutive chunks, computed elsewhere.

    Attributes:
        moments: of each chunk, since the order in which they merge decides the last bits.
        histogram: counts of all chunks together, [L, C, D, B + 2], of any unsigned type.
    """

    moments: tuple[dict[str, Moments], ...]
    histogram: npt.NDArray[np.unsignedinteger]
    edges: npt.NDArray[np.float64] | None
    sample: ProbeSample | None


class RangeFitter:
    """Moments [L, D] per concept and histograms [L, C, D, B + 2] so far. Memory does not grow with the rows.

    Args:
        concepts: C names. n_layers: L. hidden: D. bins: B.
        sample: states to train the probe on; None without the probe ranking.
    """

    def __init__(
        self, concepts: tuple[str, ...], n_layers: int, hidden: int, bins: int, sample: ProbeSample | None = None
    ) -> None:
        self.concepts = concepts
        self.bins = bins
        self.sample = sample
        self.moments = {concept: Moments.empty((n_layers, hidden)) for concept in concepts}
        self.edges: npt.NDArray[np.float64] | None = None
        self.histogram = np.zeros((n_layers, len(concepts), hidden, bins + 2), dtype=np.uint32)

    @property
    def counts(self) -> dict[str, int]:
        """Number of texts per concept."""
        return {concept: moments.count for concept, moments in self.moments.items()}

    def update(self, states: npt.NDArray[np.floating], concepts: Sequence[str]) -> dict[str, Moments]:
        """Add the states [n, L, D] of a chunk, and return its own moments.

        The first chunk sets the edges of the histograms, if they are not set.

        Args:
            concepts: of each row.
        """
        n, layers, _ = states.shape
        chunk_moments: dict[str, Moments] = {}
        if not n:
            return chunk_moments
        if self.edges is None:
            self.set_edges(states)
        assert self.edges is not None
        of_row = np.array(concepts)
        for c, concept in enumerate(self.concepts):
            own = states[of_row == concept]
            if len(own):
                chunk_moments[concept] = Moments.of(own)
                self.moments[concept] = self.moments[concept].merge(chunk_moments[concept])
                for layer in range(layers):
                    self.histogram[layer, c] += count(own[:, layer], self.edges[layer]).astype(np.uint32)
        return chunk_moments

    def set_edges(self, states: npt.NDArray[np.floating]) -> None:
        """Set the edges of the histograms around states [n, L, D], n > 0."""
        n, layers, hidden = states.shape
        self.edges = edges_from(states.reshape(n, layers * hidden), self.bins).reshape(layers, hidden, -1)

    def merge(self, part: "Part") -> None:
        """Add a part, whose first chunk must be the one after the last that was added."""
        self.edges = part.edges if self.edges is None else self.edges
        for chunk_moments in part.moments:
            for concept, moments in chunk_moments.items():
                self.moments[concept] = self.moments[concept].merge(moments)
        self.histogram += part.histogram
        if self.sample is not None and part.sample is not None:
            self.sample.merge(part.sample)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The statistics as arrays, for a checkpoint."""
        arrays: dict[str, npt.NDArray[Any]] = {"histogram": self.histogram}
        if self.edges is not None:
            arrays["edges"] = self.edges
        if self.sample is not None:
            arrays |= self.sample.arrays()
        for c, concept in enumerate(self.concepts):
            arrays[f"{c}.count"] = np.array(self.moments[concept].count)
            for name in _MOMENTS:
                arrays[f"{c}.{name}"] = getattr(self.moments[concept], name)
        return arrays

    def restore(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from `arrays`. Raises KeyError or ValueError if they are not of this fit."""
        if arrays["histogram"].shape != self.histogram.shape:
            raise ValueError("histograms of another shape")
        moments = {}
        for c, concept in enumerate(self.concepts):
            floats = {name: arrays[f"{c}.{name}"].copy() for name in _MOMENTS}
            moments[concept] = Moments(count=arrays[f"{c}.count"].item(), **floats)
        if self.sample is not None:
            self.sample.restore(arrays)
        self.edges = arrays["edges"].copy() if "edges" in arrays else None
        self.histogram, self.moments = arrays["histogram"].copy(), moments

    def layer(
        self, index: int, concepts: tuple[str, ...], rankings: tuple[Ranking, ...], probe: ProbeSettings | None
    ) -> tuple[ServeLayer, InspectLayer]:
        """Statistics of the `index`-th layer. concepts: all of the fitter's or some, in its order."""
        assert self.edges is not None
        moments = [self.moments[concept] for concept in concepts]
        counts = np.array([each.count for each in moments], dtype=np.int64)
        mean, std = np.stack([each.mean[index] for each in moments]), np.stack([each.std[index] for each in moments])
        mean_abs = np.stack([each.mean_abs[index] for each in moments])
        saliencies: dict[Ranking, npt.NDArray[np.float64]]
        saliencies = {name: saliency(name, counts, mean, std, mean_abs) for name in rankings if name != "probe"}
        if "probe" in rankings:
            assert self.sample is not None
            assert probe is not None
            saliencies["probe"] = probe_saliency(self.sample, index, concepts, self.concepts, probe)
        chosen = [self.concepts.index(concept) for concept in concepts]
        inspect = InspectLayer(
            mean_abs=mean_abs,
            m3=np.stack([each.central(3)[index] for each in moments]),
            m4=np.stack([each.central(4)[index] for each in moments]),
            minimum=np.stack([each.minimum[index] for each in moments]),
            maximum=np.stack([each.maximum[index] for each in moments]),
            edges=self.edges[index],
            histogram=self.histogram[index, chosen],
        )
        return ServeLayer(mean, std, {name: saliencies[name] for name in rankings}), inspect
