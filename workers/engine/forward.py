"""One batch through the model: the trunk once, a tail for every variant. Serving and evaluation both run on this."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from range_store.domain.erasure import Positions
from workers.engine.masks import DevicePlan, MaskTable, PlanGrid, stack_plans
from workers.models.loading import Steerable
from workers.models.steered import Trunk
from workers.models.tokens import TokenBatch

WHOLE_PASS = -1
"""In place of a split: the masks lie inside blocks, so that every variant is a full pass, and no trunk is shared."""


def open_trunk(model: Steerable, batch: TokenBatch, split: int, *, whole: bool) -> Trunk:
    """The trunk of a batch at `split`, or none worth the name at `WHOLE_PASS`; with bare logits if `whole`."""
    if split != WHOLE_PASS:
        return model.trunk(batch, split, whole=whole)
    return Trunk(WHOLE_PASS, torch.empty(0), model.logits(batch) if whole else None)


@dataclass(frozen=True)
class Variant:
    """Text `row` of the batch under `plan`."""

    row: int
    plan: DevicePlan


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of V variants, in their order.

    Attributes:
        logits: [V, K]. masked: neurons masked at the read position of each, [V] int64.
        by_concept: neurons masked there by each concept, over all variants. of: how many it could have masked.
    """

    logits: Tensor
    masked: Tensor
    by_concept: Counter[str]
    of: Counter[str]


def steer_variants(
    model: Steerable,
    batch: TokenBatch,
    trunk: Trunk,
    variants: Sequence[Variant],
    max_tokens: int,
    positions: Positions = "all",
) -> Outcome:
    """Run the tail of every variant on one trunk.

    Args:
        max_tokens: padded tokens that a tail takes at once; more variants run in turns. The tail of the last block is
            one token wide.
    """
    step = max(1, max_tokens // model.tail_width(batch, trunk.split))
    parts = [
        _steer(model, batch, trunk, variants[start : start + step], positions)
        for start in range(0, len(variants), step)
    ]
    return Outcome(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.masked for part in parts]),
        sum((part.by_concept for part in parts), Counter()),
        sum((part.of for part in parts), Counter()),
    )


def _steer(
    model: Steerable, batch: TokenBatch, trunk: Trunk, variants: Sequence[Variant], positions: Positions
) -> Outcome:
    plans: dict[str, int] = {}
    distinct: list[DevicePlan] = []
    slots = []
    for variant in variants:
        key = variant.plan.plan.key
        if key not in plans:
            plans[key] = len(distinct)
            distinct.append(variant.plan)
        slots.append(plans[key])
    device = batch.ids.device
    table = MaskTable(distinct, torch.tensor(slots, device=device), positions)
    rows = torch.tensor([variant.row for variant in variants], device=device)
    logits = model.steer(batch, trunk, rows, table)
    return Outcome(logits, table.masked, *table.by_concept())


class PlanSweep:
    """Many plans of one split, to be run over many batches: every text under every plan (evaluation).

    Args:
        plans: P of them, with the same lowest masked block.
    """

    def __init__(self, plans: Sequence[DevicePlan], positions: Positions) -> None:
        self.plans = plans
        self._positions = positions
        self._tables = stack_plans(plans)

    def turns(self, model: Steerable, batch: TokenBatch, trunk: Trunk, max_tokens: int) -> list[slice]:
        """The plans in turns that are run at once.

        Args:
            max_tokens: padded tokens that a tail takes, if more than one plan fits.
        """
        step = max(1, max_tokens // (len(batch.ids) * model.tail_width(batch, trunk.split)))
        return [slice(start, min(start + step, len(self.plans))) for start in range(0, len(self.plans), step)]

    def logits(self, model: Steerable, batch: TokenBatch, trunk: Trunk, turn: slice) -> Tensor:
        """Logits [p, B, K] of one turn's plans."""
        texts, plans = len(batch.ids), self.plans[turn]
        tables = {layer: table.plans(turn) for layer, table in self._tables.items()}
        rows = torch.arange(texts, device=batch.ids.device).repeat(len(plans))
        logits = model.steer(batch, trunk, rows, PlanGrid(plans, tables, texts, self._positions))
        return logits.view(len(plans), texts, -1)
