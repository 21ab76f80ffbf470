"""One batch through the model: the trunk once, a tail for every variant. Serving and evaluation both run on this."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.masks import DevicePlan, MaskTable
from workers.models.steered import SteeredModel, Trunk
from workers.models.tokens import TokenBatch


@dataclass(frozen=True)
class Variant:
    """Text `row` of the batch under `plan`."""

    row: int
    plan: DevicePlan


@dataclass(frozen=True, eq=False)
class Outcome:
    """Logits [V, K] of the variants in their order, and neurons masked at the read position of each, [V] int64."""

    logits: Tensor
    masked: Tensor


def steer_variants(
    model: SteeredModel, batch: TokenBatch, trunk: Trunk, variants: Sequence[Variant], max_tokens: int
) -> Outcome:
    """Run the tail of every variant on one trunk.

    Args:
        max_tokens: padded tokens that a tail with blocks in it takes at once; more variants run in turns. The tail
            of the last block is one token wide and runs in one turn.
    """
    width = 1 if trunk.split == model.n_layers - 1 and model.splits else batch.ids.shape[1]
    step = max(1, max_tokens // width)
    parts = [_steer(model, batch, trunk, variants[start : start + step]) for start in range(0, len(variants), step)]
    return Outcome(torch.cat([part.logits for part in parts]), torch.cat([part.masked for part in parts]))


def _steer(model: SteeredModel, batch: TokenBatch, trunk: Trunk, variants: Sequence[Variant]) -> Outcome:
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
    table = MaskTable(distinct, torch.tensor(slots, device=device))
    rows = torch.tensor([variant.row for variant in variants], device=device)
    return Outcome(model.steer(batch, trunk, rows, table), table.masked)
