"""A plan: the erasures of one request, resolved to edits against one range set, and frozen."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Damp, Erasure, Site, check_distinct_concepts, resolve_layers
from range_store.domain.range_set import RangeSet
from range_store.domain.ranges import EMPTY, range_bounds
from range_store.domain.rankings import min_top_fraction, rest_mean, top_neurons
from range_store.errors import InvalidErasure


@dataclass(frozen=True, eq=False)
class LayerEdits:
    """The edits of a plan at one block; one row of each array per erasure, in the plan's order (I erasures, D neurons).

    Neuron j is masked by erasure i when `always[i, j]`, or when low[i, j] ≤ h_j ≤ high[i, j]; it then becomes
    scale[i, j]·h_j + offset[i, j]. Where several erasures mask one neuron, the first one's replacement counts.
    low, high, scale, offset: [I, D] float32; always: [I, D] bool.
    """

    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    always: npt.NDArray[np.bool_]
    scale: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.low, self.high, self.always, self.scale, self.offset))


@dataclass(frozen=True, eq=False)
class Plan:
    """Erasures resolved to edits per block. `layers` of each erasure are resolved block indices, ascending.

    Plans with the same `key` do the same to a text. `site`: where in the blocks it edits. The empty plan has no edits
    and no split.
    """

    erasures: tuple[Erasure, ...] = ()
    edits: Mapping[int, LayerEdits] = field(default_factory=dict)
    key: str = ""
    site: Site = "block_output"

    @property
    def split(self) -> int | None:
        """The lowest edited block: trunk up to and including it, tail after it. None for the empty plan."""
        return min(self.edits, default=None)

    @property
    def nbytes(self) -> int:
        """Size of its edits."""
        return sum(edits.nbytes for edits in self.edits.values())


NO_ERASURE = Plan()


def resolve(range_set: RangeSet, erasures: Sequence[Erasure]) -> Plan:
    """The plan that `erasures`, in this order, make on `range_set`.

    Raises:
        InvalidErasure: one concept twice, a layer that the model does not have, or an erasure that masks no neuron or
            leaves every masked one as it is.
        UnknownConcept, NotFitted: the range set lacks the concept, layer or ranking.
    """
    if not erasures:
        return NO_ERASURE
    check_distinct_concepts([erasure.concept for erasure in erasures])
    n_layers = range_set.provenance.model.n_layers
    resolved = tuple(e.model_copy(update={"layers": resolve_layers(e.layers, n_layers)}) for e in erasures)
    rows: dict[int, list[LayerEdits]] = {}
    for erasure in resolved:
        for layer in erasure.layers:
            assert isinstance(layer, int)
            rows.setdefault(layer, []).append(_edits(range_set, erasure, layer))
    edits = {layer: _stack(parts) for layer, parts in sorted(rows.items())}
    text = range_set.id + "".join(e.model_dump_json() for e in resolved)
    return Plan(resolved, edits, hashlib.sha256(text.encode()).hexdigest(), range_set.provenance.settings.site)


def _edits(range_set: RangeSet, erasure: Erasure, layer: int) -> LayerEdits:
    """The edits of one erasure at one block, its arrays of shape [D]."""
    serve = range_set.layer(layer)
    concept = range_set.concept_index(erasure.concept)
    salient = top_neurons(range_set.saliency(layer, erasure.ranking, erasure.concept), erasure.top_fraction)
    hidden = range_set.provenance.model.hidden_size
    if not salient.size:
        raise InvalidErasure(
            f"top_fraction {erasure.top_fraction:g} masks none of the {hidden} neurons, so {erasure.concept!r} would "
            f"not be erased: use {min_top_fraction(hidden):g} or more"
        )
    if isinstance(erasure.replacement, Damp) and erasure.replacement.damp == 1:
        raise InvalidErasure(f"damp 1 leaves every neuron as it is, so {erasure.concept!r} would not be erased")
    low = np.full(hidden, EMPTY[0], dtype=np.float32)
    high = np.full(hidden, EMPTY[1], dtype=np.float32)
    always = np.zeros(hidden, dtype=np.bool_)
    if erasure.method == "neuron":
        always[salient] = True
    else:
        count = range_set.counts[concept]
        lows, highs = range_bounds(erasure.rule, erasure.tau, np.array(count), serve.mean[concept], serve.std[concept])
        with np.errstate(over="ignore"):  # a bound beyond float32 is no bound: ±∞
            low[salient], high[salient] = lows[salient], highs[salient]
    scale = np.zeros(hidden, dtype=np.float32)
    offset = np.zeros(hidden, dtype=np.float32)
    if isinstance(erasure.replacement, Damp):
        scale[:] = erasure.replacement.damp
    elif erasure.replacement == "mean":
        others = rest_mean(range_set.counts, serve.mean)[concept]
        offset[:] = np.where(np.isfinite(others), others, 0.0)  # a lone concept has no others: back to zero
    return LayerEdits(low, high, always, scale, offset)


def _stack(parts: list[LayerEdits]) -> LayerEdits:
    names = ("low", "high", "always", "scale", "offset")
    return LayerEdits(**{name: np.stack([getattr(part, name) for part in parts]) for name in names})
