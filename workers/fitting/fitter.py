"""Running statistics of every layer, concept and neuron: a mutable fitter, and the arrays of a range set at its end."""

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
    """Statistics of some chunks in a row, made elsewhere: moments stay apart by chunk, since the order that they merge
    in decides the last bits; the counts of a histogram are one sum [L, C, D, B + 2], of any unsigned type."""

    moments: tuple[dict[str, Moments], ...]
    histogram: npt.NDArray[np.unsignedinteger]
    edges: npt.NDArray[np.float64] | None
    sample: ProbeSample | None


class RangeFitter:
    """Statistics so far: moments [L, D] per concept and histograms [L, C, D, B + 2]; memory does not grow with rows.

    Args:
        concepts: C of them; n_layers: L layers; hidden: D; bins: B.
        sample: states to train the probe on; None where it is not wanted.
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
        """Texts counted in, per concept."""
        return {concept: moments.count for concept, moments in self.moments.items()}

    def update(self, states: npt.NDArray[np.floating], concepts: Sequence[str]) -> dict[str, Moments]:
        """Count a chunk in, and give its own moments. Where the histograms have no edges yet, it sets them.

        states: [n, L, D]; concepts: of each row.
        """
        n, layers, _ = states.shape
        of_chunk: dict[str, Moments] = {}
        if not n:
            return of_chunk
        if self.edges is None:
            self.set_edges(states)
        assert self.edges is not None
        of_row = np.array(concepts)
        for c, concept in enumerate(self.concepts):
            own = states[of_row == concept]
            if len(own):
                of_chunk[concept] = Moments.of(own)
                self.moments[concept] = self.moments[concept].merge(of_chunk[concept])
                for layer in range(layers):
                    self.histogram[layer, c] += count(own[:, layer], self.edges[layer]).astype(np.uint32)

        return of_chunk

    def set_edges(self, states: npt.NDArray[np.floating]) -> None:
        """Let the histograms have edges around these states [n, L, D], of which there are some."""
        n, layers, hidden = states.shape
        self.edges = edges_from(states.reshape(n, layers * hidden), self.bins).reshape(layers, hidden, -1)

    def merge(self, part: "Part") -> None:
        """Count the chunks of a part in, which come right after those that were counted in before."""
        self.edges = part.edges if self.edges is None else self.edges
        for of_chunk in part.moments:
            for concept, moments in of_chunk.items():
                self.moments[concept] = self.moments[concept].merge(moments)
        self.histogram += part.histogram
        if self.sample is not None and part.sample is not None:
            self.sample.merge(part.sample)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays, for a checkpoint."""
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
        """Undo `arrays`. Raises KeyError or ValueError if they are not of this fit."""
        if arrays["histogram"].shape != self.histogram.shape:
            raise ValueError("another shape")
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
        """Statistics of the `index`-th layer for `concepts`, some or all of the fitter's, in its order."""
        assert self.edges is not None
        moments = [self.moments[concept] for concept in concepts]
        counts = np.array([each.count for each in moments], dtype=np.int64)
        mean, std = _rows([each.mean[index] for each in moments]), _rows([each.std[index] for each in moments])
        mean_abs = _rows([each.mean_abs[index] for each in moments])
        saliencies: dict[Ranking, npt.NDArray[np.float64]]
        saliencies = {name: saliency(name, counts, mean, std, mean_abs) for name in rankings if name != "probe"}
        if "probe" in rankings:
            assert self.sample is not None
            assert probe is not None
            saliencies["probe"] = probe_saliency(self.sample, index, concepts, self.concepts, probe)
        chosen = [self.concepts.index(concept) for concept in concepts]
        inspect = InspectLayer(
            mean_abs=mean_abs,
            m3=_rows([each.central(3)[index] for each in moments]),
            m4=_rows([each.central(4)[index] for each in moments]),
            minimum=_rows([each.minimum[index] for each in moments]),
            maximum=_rows([each.maximum[index] for each in moments]),
            edges=self.edges[index],
            histogram=self.histogram[index, chosen],
        )
        return ServeLayer(mean, std, {name: saliencies[name] for name in rankings}), inspect


def _rows(values: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.stack(values)
