"""Plans as tensors on the device, and many plans as one table that masks a whole batch at once.

A plan's tensors never change once made, and a batch's table is built from the plans of that batch: a toggle gives
later requests another plan, and nothing that is queued or running can be touched by it (DESIGN promise 4).
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from range_store.domain.erasure import Positions, Site
from range_store.domain.plan import LayerMask, Plan
from workers.models.tokens import TokenBatch


@dataclass(frozen=True, eq=False)
class DeviceMask:
    """A `LayerMask` on the device, in float32: low, high, scale, offset [I, D]; always [I, D] bool.

    `scaled`: some scale is not 0, so that what a masked value becomes depends on it.
    """

    low: Tensor
    high: Tensor
    always: Tensor
    scale: Tensor
    offset: Tensor
    scaled: bool

    @classmethod
    def of(cls, mask: LayerMask, device: torch.device) -> "DeviceMask":
        low, high, always, scale, offset = (
            torch.from_numpy(array).to(device) for array in (mask.low, mask.high, mask.always, mask.scale, mask.offset)
        )
        return cls(low, high, always, scale, offset, scaled=bool(mask.scale.any()))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.low, self.high, self.always, self.scale, self.offset

    def map(self, change: Callable[[Tensor], Tensor]) -> "DeviceMask":
        """The same mask with every array changed."""
        low, high, always, scale, offset = map(change, self.parts)
        return DeviceMask(low, high, always, scale, offset, self.scaled)

    def plans(self, some: slice) -> "DeviceMask":
        """Of stacked masks [P, …], those of some plans."""
        return self.map(lambda part: part[some])


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """A plan whose masks lie on the device."""

    plan: Plan
    masks: dict[int, DeviceMask]

    @property
    def nbytes(self) -> int:
        """Of its masks, on the device."""
        return sum(part.nbytes for mask in self.masks.values() for part in mask.parts)

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "DevicePlan":
        return cls(plan, {layer: DeviceMask.of(mask, device) for layer, mask in plan.masks.items()})


class MaskTable:
    """The masks of one batch of variants; row v of the batch is masked by `plans[slots[v]]`.

    After the pass, `masked` [V] int64 counts the neurons that were masked at the read position, union over the
    concepts of the plan and summed over layers; `by_concept` counts them for each concept.

    Args:
        plans: the distinct plans of the batch, S of them, all of one site.
        slots: plan of each variant, [V] int64 on the device.
        positions: which tokens are masked.
    """

    def __init__(self, plans: Sequence[DevicePlan], slots: Tensor, positions: Positions = "all") -> None:
        self.positions = positions
        self._plans = plans
        self._slots = slots
        self._tables = stack_plans(plans)
        self.masked = torch.zeros_like(slots)
        self._hits: dict[int, Tensor] = {}

    @property
    def layers(self) -> Collection[int]:
        return self._tables.keys()

    @property
    def site(self) -> Site:
        return self._plans[0].plan.site

    @property
    def keys(self) -> Sequence[str]:
        return [self._plans[slot].plan.key for slot in self._slots.tolist()]

    def row(self, variant: int) -> "MaskTable":
        """The table of one variant, for a batch of one row; what it masks is not counted here."""
        plan = self._plans[int(self._slots[variant])]
        return MaskTable([plan], torch.zeros_like(self._slots[:1]), self.positions)

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """`hidden` [V, T, D] with the masked components replaced, at every real or read token and never at padding."""
        table = self._tables[layer]
        rows = self._slots if table.low.shape[0] > 1 else torch.zeros_like(self._slots[:1])
        own = table.map(lambda part: part[rows])  # [V, I, D], or [1, I, D] with one plan
        at = torch.arange(len(hidden), device=hidden.device)
        read = hidden[at, batch.read].float().unsqueeze(1)  # [V, 1, D]
        hit = ((read >= own.low) & (read <= own.high)) | own.always
        self._hits[layer] = hit.sum(dim=-1)
        self.masked = self.masked + hit.any(dim=1).sum(dim=-1)
        return _apply(own.map(lambda part: part.unsqueeze(2)), hidden, maskable(batch, self.positions))

    def by_concept(self) -> tuple[Counter[str], Counter[str]]:
        """Of the neurons of every variant at the read position: how many each concept masked, and could have."""
        masked, all_of_them = Counter[str](), Counter[str]()
        slots = self._slots.cpu()
        for layer, hits in self._hits.items():
            totals = torch.zeros((len(self._plans), hits.shape[1]), dtype=torch.int64)
            totals.index_add_(0, slots, hits.cpu())
            variants = torch.bincount(slots, minlength=len(self._plans)).tolist()
            width = self._tables[layer].low.shape[-1]
            for plan, counts, number in zip(self._plans, totals.tolist(), variants, strict=True):
                concepts = [erasure.concept for erasure in plan.plan.erasures if layer in erasure.layers]
                for concept, count in zip(concepts, counts, strict=False):  # a plan may have fewer than the widest
                    masked[concept] += count
                    all_of_them[concept] += number * width
        return masked, all_of_them


class PlanGrid:
    """Every text under every plan: variants in the order of the plans, B texts each (evaluation; nothing is counted).

    Args:
        plans: P of them, of one site.
        tables: their masks, stacked once for many batches; see `stack_plans`.
        texts: B.
    """

    def __init__(
        self, plans: Sequence[DevicePlan], tables: Mapping[int, DeviceMask], texts: int, positions: Positions
    ) -> None:
        self.positions = positions
        self._plans, self._tables, self._texts = plans, tables, texts

    @property
    def layers(self) -> Collection[int]:
        return self._tables.keys()

    @property
    def site(self) -> Site:
        return self._plans[0].plan.site

    @property
    def keys(self) -> Sequence[str]:
        return [plan.plan.key for plan in self._plans for _ in range(self._texts)]

    def row(self, variant: int) -> MaskTable:
        """The masking of one variant, for a batch of one row."""
        plan = self._plans[variant // self._texts]
        some = next(iter(plan.masks.values()))
        return MaskTable([plan], torch.zeros(1, dtype=torch.int64, device=some.low.device), self.positions)

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """`hidden` [P·B, T, D] with the masked components replaced."""
        table = self._tables[layer].map(lambda part: part[:, :, None, None])  # [P, I, 1, 1, D]
        shape = (len(self._plans), self._texts)
        real = maskable(batch, self.positions).view(*shape, -1)
        return _apply(table, hidden.view(*shape, *hidden.shape[1:]), real).flatten(0, 1)


def stack_plans(plans: Sequence[DevicePlan]) -> dict[int, DeviceMask]:
    """The plans' masks by layer, arrays [P, I, D]."""
    layers = sorted({layer for plan in plans for layer in plan.masks})
    return {layer: _stack([plan.masks.get(layer) for plan in plans]) for layer in layers}


def maskable(batch: TokenBatch, positions: Positions) -> Tensor:
    """Which tokens may be masked, [V, T] bool: real ones, or those of them that are read."""
    return batch.mask if positions == "all" else batch.mask & batch.is_read


def _apply(table: DeviceMask, hidden: Tensor, tokens: Tensor) -> Tensor:
    """`hidden` [..., T, D] with the components in a range replaced.

    Values are compared in float32, whatever the serving dtype: bounds cast to bfloat16 would move.

    Args:
        table: arrays [..., I, (1 …,) 1, D]; axis 1 is the plan's erasures, of which the first that hits counts.
        tokens: [..., T], those that may be masked.
    """
    value = hidden.float()
    real = tokens.unsqueeze(-1)
    result = hidden
    masked: Tensor | None = None
    for i in range(table.low.shape[1]):
        low, high, always, scale, offset = (part[:, i] for part in table.parts)
        hit = (((value >= low) & (value <= high)) | always) & real
        first = hit if masked is None else hit & ~masked
        # where scale is 0 the value must not count at all: 0 · inf and 0 · NaN are NaN
        replacement = torch.where(scale == 0, offset, scale * value + offset) if table.scaled else offset
        result = torch.where(first, replacement.to(hidden.dtype), result)
        masked = hit if masked is None else masked | hit
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
        scaled=any(mask.scaled for mask in masks if mask is not None),
    )
    for slot, mask in enumerate(masks):
        if mask is not None:
            n = len(mask.low)
            table.low[slot, :n], table.high[slot, :n], table.always[slot, :n] = mask.low, mask.high, mask.always
            table.scale[slot, :n], table.offset[slot, :n] = mask.scale, mask.offset
    return table
