"""The settings of an evaluation: every combination of them is measured with every target."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from range_store.domain.erasure import Erasure, Method, Positions, Ranking, Replacement, resolve_layers

Others = Literal["pooled", "classes"]
Layers = tuple[int, ...]
"""Blocks that are masked jointly."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Neuron masking has no τ, and is measured once for all of them.

    Attributes:
        layers: blocks to mask; negative ones count from the end. The blocks of an entry are masked jointly, the entries
            one after another. "all": each block alone.
        targets: concepts to erase, each alone; None: all of the range set.
        positions: mask every real token, or the read position alone.
        correct_only: measure only texts that the unmasked model classifies correctly (the paper's curation for Llama).
        rows_per_class: measure only the first so many of these of each class.
        others: whether CAcc and CConf are over all other texts "pooled", or the unweighted mean over the other
            "classes". The paper's aggregates mix the two.
        resamples: of the bootstrap; 0: no intervals. seed: of its draws.
        batch_tokens: padded tokens of a batch.
    """

    methods: tuple[Method, ...] = ("neuron", "range")
    rankings: tuple[Ranking, ...] = ("max",)
    top_fractions: tuple[float, ...] = (0.3,)
    taus: tuple[float, ...] = (2.5,)
    layers: tuple[Layers, ...] | Literal["all"] = ((-1,),)
    targets: tuple[str, ...] | None = None
    replacements: tuple[Replacement, ...] = ("zero",)
    positions: tuple[Positions, ...] = ("all",)
    correct_only: bool = False
    rows_per_class: int | None = None
    others: Others = "pooled"
    resamples: int = 1000
    seed: int = 0
    batch_tokens: int = 4096

    def resolved_layers(self, n_layers: int) -> tuple[Layers, ...]:
        """Groups of blocks, counted from 0.

        Raises:
            InvalidErasure: a group has a block that the model does not have, or a block twice.
        """
        groups = tuple((layer,) for layer in range(n_layers)) if self.layers == "all" else self.layers
        return tuple(dict.fromkeys(resolve_layers(group, n_layers) for group in groups))

    def as_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        chosen = asdict(self)
        chosen["replacements"] = [each if isinstance(each, str) else each.model_dump() for each in self.replacements]
        return chosen


@dataclass(frozen=True)
class Setting:
    """One combination of settings, and its erasures: one per target, in the order of the targets."""

    layers: Layers
    positions: Positions
    erasures: tuple[Erasure, ...]


def grid(settings: EvaluationSettings, groups: Sequence[Layers], targets: Sequence[str]) -> Iterator[Setting]:
    """Every combination of settings, layer by layer. groups: blocks counted from 0."""
    choices = product(
        groups,
        settings.positions,
        settings.replacements,
        settings.rankings,
        settings.methods,
        settings.top_fractions,
    )
    for layers, positions, replacement, ranking, method, fraction in choices:
        for tau in settings.taus if method == "range" else settings.taus[:1]:
            yield Setting(
                layers,
                positions,
                tuple(
                    Erasure(
                        concept=target,
                        method=method,
                        tau=tau,
                        top_fraction=fraction,
                        ranking=ranking,
                        layers=layers,
                        replacement=replacement,
                    )
                    for target in targets
                ),
            )
