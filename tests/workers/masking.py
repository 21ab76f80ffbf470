"""Maskings for tests, written without the code under test."""

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor

from range_store.domain.erasure import Positions, Site
from range_store.domain.plan import Plan
from workers.edits.batch_edits import BatchEdits
from workers.edits.slot_table import SlotTable
from workers.models.tokens import TokenBatch


def edits_of(plans: Sequence[Plan], repeats: int = 1, positions: Positions = "all") -> BatchEdits:
    """Edits of a batch, with a slot table of their own on the CPU."""
    some = next(iter(plans[0].edits.values()))
    return BatchEdits(SlotTable(some.low.shape[1], "cpu"), plans, repeats, positions)


class Alike:
    """Base of maskings that mask all variants alike, at every real token."""

    site: Site = "block_output"
    positions: Positions = "all"
    keys: Sequence[str] = ()

    def row(self, variant: int) -> Self:
        return self


class ZeroBand(Alike):
    """Components whose value lies in [low, high] become 0, at real tokens, at some layers."""

    def __init__(self, layers: Collection[int], low: float = -0.7, high: float = 0.4) -> None:
        self.layers = layers
        self.low, self.high = low, high

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        hit = (hidden >= self.low) & (hidden <= self.high) & batch.mask.unsqueeze(-1)
        return torch.where(hit, torch.zeros_like(hidden), hidden)
