"""Tails of many variants on one trunk. Serving and evaluation both run on this."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from range_store.domain.erasure import Positions
from range_store.domain.plan import Plan
from workers.edits.batch_edits import BatchEdits
from workers.edits.slot_table import SlotTable
from workers.models.steerable import SteerableModel, Trunk
from workers.models.tokens import TokenBatch


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of the variants of G plans, n texts each.

    Attributes:
        logits: [G, n, K]. masked: neurons masked at the read position of each, [G, n] int64.
        by_concept: neurons masked there by each concept, over all variants. possible: how many it could have masked.
    """

    logits: Tensor
    masked: Tensor
    by_concept: Counter[str]
    possible: Counter[str]


@dataclass(frozen=True, eq=False)
class Variants:
    """The texts of one trunk under plans: texts `rows[g]` of the batch under `plans[g]`.

    Args:
        rows: [G, n] int64.
    """

    model: SteerableModel
    table: SlotTable
    batch: TokenBatch
    trunk: Trunk
    plans: Sequence[Plan]
    rows: Tensor
    positions: Positions = "all"

    def turns(self, max_tokens: int) -> Iterator[slice]:
        """Split the plans into turns that run at once.

        A turn has at most `max_tokens` padded tokens, of which the tail of the last block has one per variant, and its
        edits fit the table. A plan that exceeds either is a turn of its own.
        """
        most = max(1, max_tokens // (self.rows.shape[1] * self.model.tail_width(self.batch, self.trunk.split)))
        start = 0
        while start < len(self.plans):
            stop = min(start + most, len(self.plans))
            while not self.table.fits(self.plans[start:stop]):
                stop -= 1
            yield slice(start, stop)
            start = stop

    def run(self, turn: slice, *, counted: bool = True) -> Outcome:
        """Run the tails of one turn."""
        rows = self.rows[turn]
        edits = BatchEdits(self.table, self.plans[turn], rows.shape[1], self.positions, counted=counted)
        logits = self.model.steer(self.batch, self.trunk, rows.flatten(), edits)
        return Outcome(logits.view(*rows.shape, -1), edits.masked.view(rows.shape), *edits.by_concept())

    def run_all(self, max_tokens: int) -> Outcome:
        """Run the tails of all plans, turn by turn."""
        parts = [self.run(turn) for turn in self.turns(max_tokens)]
        return Outcome(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.masked for part in parts]),
            sum((part.by_concept for part in parts), Counter()),
            sum((part.possible for part in parts), Counter()),
        )
