"""Views of a range set for people: ranges by rank, one neuron's statistics, overlap of salient sets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Ranking, resolve_layers
from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.domain.ranges import overlap_coefficient, range_bounds
from range_store.domain.rankings import rank_order, top_count, top_neurons
from range_store.errors import InvalidErasure, UnknownNeuron

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankedRange:
    """One neuron's range for one concept. `overlap`: coefficient with each other concept's range."""

    rank: int
    neuron: int
    saliency: float
    mean: float
    std: float
    low: float
    high: float
    overlap: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Overlap:
    """Polysemanticity (paper Figure 2). share[c, c']: fraction of c's k salient neurons that c' shares, [C, C]."""

    k: int
    hidden: int
    share: Floats
    jaccard: Floats
    shared_by_all: tuple[int, ...]

    @property
    def chance(self) -> float:
        """The expected share of two random sets of k of D neurons."""
        return self.k / self.hidden


@dataclass(frozen=True)
class NeuronStatistics:
    """One concept's statistics of one neuron; `rank` counts from 0. Histogram without its overflow columns."""

    concept: str
    texts: int
    mean: float
    std: float
    mean_abs: float
    skewness: float
    kurtosis: float
    minimum: float
    maximum: float
    low: float
    high: float
    saliency: Mapping[Ranking, float]
    rank: Mapping[Ranking, int]
    below: int
    counts: tuple[int, ...]
    above: int


def block_index(range_set: RangeSet, layer: int) -> int:
    """Return `layer` counted from 0; negative ones count from the end.

    Raises:
        UnknownNeuron: the model has no such block.
    """
    try:
        return resolve_layers((layer,), range_set.provenance.model.n_layers)[0]
    except InvalidErasure as error:
        raise UnknownNeuron(str(error)) from None


def ranked_ranges(
    range_set: RangeSet, concept: str, layer: int, ranking: Ranking, tau: float, start: int, limit: int
) -> list[RankedRange]:
    """Return the ranges of the neurons of ranks `start` to `start + limit` for a concept, most salient first.

    Raises:
        UnknownConcept, NotFitted: the range set lacks the concept, layer or ranking.
    """
    serve = range_set.layer(layer)
    row = range_set.concept_index(concept)
    saliency = range_set.saliency(layer, ranking, concept)
    chosen = rank_order(saliency)[start : start + limit]
    low, high = range_bounds("sigma", tau, range_set.counts[:, None], serve.mean[:, chosen], serve.std[:, chosen])
    overlaps = overlap_coefficient(low[row], high[row], low, high)
    return [
        RankedRange(
            rank=start + place,
            neuron=int(neuron),
            saliency=float(saliency[neuron]),
            mean=float(serve.mean[row, neuron]),
            std=float(serve.std[row, neuron]),
            low=float(low[row, place]),
            high=float(high[row, place]),
            overlap={
                other: float(overlaps[c, place]) for c, other in enumerate(range_set.concepts) if other != concept
            },
        )
        for place, neuron in enumerate(chosen)
    ]


def salient_overlap(range_set: RangeSet, layer: int, ranking: Ranking, top_fraction: float) -> Overlap:
    """Return how much the salient sets of all concepts overlap.

    Raises:
        NotFitted: the range set lacks the layer or ranking.
    """
    hidden = range_set.provenance.model.hidden_size
    k = top_count(top_fraction, hidden)
    member = np.zeros((len(range_set.concepts), hidden), dtype=np.bool_)
    for row, concept in enumerate(range_set.concepts):
        member[row, top_neurons(range_set.saliency(layer, ranking, concept), top_fraction)] = True
    shared = (member.astype(np.int64) @ member.T.astype(np.int64)).astype(np.float64)
    union = 2 * k - shared
    return Overlap(
        k=k,
        hidden=hidden,
        share=shared / k if k else np.zeros_like(shared),
        jaccard=np.divide(shared, union, out=np.zeros_like(shared), where=union > 0),
        shared_by_all=tuple(int(neuron) for neuron in np.flatnonzero(member.all(axis=0))),
    )


def neuron_statistics(
    range_set: RangeSet, inspect: InspectLayer, layer: int, neuron: int, tau: float
) -> list[NeuronStatistics]:
    """Return each concept's statistics, range and histogram of one neuron. Skewness of a constant neuron is NaN.

    Raises:
        NotFitted: the range set lacks the layer.
        UnknownNeuron: the model has no such neuron.
    """
    hidden = range_set.provenance.model.hidden_size
    if not 0 <= neuron < hidden:
        raise UnknownNeuron(f"neuron {neuron} is out of range: a block has {hidden}, 0 to {hidden - 1}")
    serve = range_set.layer(layer)
    low, high = range_bounds("sigma", tau, range_set.counts, serve.mean[:, neuron], serve.std[:, neuron])
    ranks = {
        ranking: [int(np.flatnonzero(rank_order(of_concept) == neuron)[0]) for of_concept in values]
        for ranking, values in serve.saliency.items()
    }
    found = []
    for row, concept in enumerate(range_set.concepts):
        std = serve.std[row, neuron]
        with np.errstate(divide="ignore", invalid="ignore"):
            skewness, kurtosis = inspect.m3[row, neuron] / std**3, inspect.m4[row, neuron] / std**4
        histogram = inspect.histogram[row, neuron]
        found.append(
            NeuronStatistics(
                concept=concept,
                texts=int(range_set.counts[row]),
                mean=float(serve.mean[row, neuron]),
                std=float(std),
                mean_abs=float(inspect.mean_abs[row, neuron]),
                skewness=float(skewness),
                kurtosis=float(kurtosis),
                minimum=float(inspect.minimum[row, neuron]),
                maximum=float(inspect.maximum[row, neuron]),
                low=float(low[row]),
                high=float(high[row]),
                saliency={ranking: float(values[row, neuron]) for ranking, values in serve.saliency.items()},
                rank={ranking: of_concept[row] for ranking, of_concept in ranks.items()},
                below=int(histogram[0]),
                counts=tuple(histogram[1:-1].tolist()),
                above=int(histogram[-1]),
            )
        )
    return found
