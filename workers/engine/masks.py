"""Plans as tensors on the device, and many plans as one table that masks a whole batch at once.

A plan's tensors never change once made, and a batch's table is built from the plans of that batch: a toggle gives
later requests another plan, and nothing that is queued or running can be touched by it (DESIGN promise 4).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from range_store.plan import LayerMask, Plan
from workers.models.tokens import TokenBatch


@dataclass(frozen=True, eq=False)
class DeviceMask:
    """A `LayerMask` on the device, in float32: low, high, scale, offset [I, D]; always [I, D] bool."""

    low: Tensor
    high: Tensor
    always: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def of(cls, mask: LayerMask, device: torch.device) -> "DeviceMask":
        return cls(
            *(torch.from_numpy(a).to(device) for a in (mask.low, mask.high, mask.always, mask.scale, mask.offset))
        )


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """A plan whose masks lie on the device."""

    plan: Plan
    masks: dict[int, DeviceMask]

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "DevicePlan":
        return cls(plan, {layer: DeviceMask.of(mask, device) for layer, mask in plan.masks.items()})


class MaskTable:
    """The masks of one batch of variants; row v of the batch is masked by `plans[slots[v]]`.

    After the pass, `masked` [V] int64 counts the neurons that were masked at the read position, union over the
    concepts of the plan and summed over layers.

    Args:
        plans: the distinct plans of the batch, S of them.
        slots: plan of each variant, [V] int64 on the device.
    """

    def __init__(self, plans: Sequence[DevicePlan], slots: Tensor) -> None:
        self._slots = slots
        self._tables = {
            layer: _stack([plan.masks.get(layer) for plan in plans])
            for layer in sorted({layer for plan in plans for layer in plan.masks})
        }
        self.masked = torch.zeros_like(slots)

    @property
    def layers(self) -> Collection[int]:
        return self._tables.keys()

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """`hidden` [V, T, D] with the masked components replaced, at every real token and never at padding.

        Values are compared in float32, whatever the serving dtype: bounds cast to bfloat16 would move.
        """
        table = self._tables[layer]
        intervals = table.low.shape[1]
        rows = self._slots if table.low.shape[0] > 1 else torch.zeros_like(self._slots[:1])
        value = hidden.float()
        real = batch.mask.unsqueeze(-1)
        result = hidden
        masked: Tensor | None = None
        for i in range(intervals):
            low, high, always, scale, offset = (
                part[rows, i].unsqueeze(1)  # [V, 1, D], or [1, 1, D] where the whole batch has one plan
                for part in (table.low, table.high, table.always, table.scale, table.offset)
            )
            hit = (((value >= low) & (value <= high)) | always) & real
            first = hit if masked is None else hit & ~masked
            # where scale is 0 the value must not count at all: 0 · inf and 0 · NaN are NaN
            replacement = torch.where(scale == 0, offset, scale * value + offset)
            result = torch.where(first, replacement.to(hidden.dtype), result)
            masked = hit if masked is None else masked | hit
        assert masked is not None
        at = torch.arange(len(hidden), device=hidden.device)
        self.masked = self.masked + masked[at, batch.read].sum(dim=-1)
        return result


def _stack(masks: Sequence[DeviceMask | None]) -> DeviceMask:
    """Arrays [S, I, D], I the largest number of erasures in a plan; missing rows mask nothing."""
    some = next(mask for mask in masks if mask is not None)
    intervals = max(len(mask.low) for mask in masks if mask is not None)
    shape = (len(masks), intervals, some.low.shape[1])
    table = DeviceMask(
        low=some.low.new_full(shape, torch.inf),
        high=some.high.new_full(shape, -torch.inf),
        always=some.always.new_zeros(shape),
        scale=some.scale.new_zeros(shape),
        offset=some.offset.new_zeros(shape),
    )
    for slot, mask in enumerate(masks):
        if mask is not None:
            n = len(mask.low)
            table.low[slot, :n], table.high[slot, :n], table.always[slot, :n] = mask.low, mask.high, mask.always
            table.scale[slot, :n], table.offset[slot, :n] = mask.scale, mask.offset
    return table
