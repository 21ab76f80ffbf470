"""The edits of many plans on the device: one slot for each erasure at each block.

S: slots, R: slots of a plan at one block, D: neurons.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from range_store.domain.plan import Plan

DEFAULT_BYTES = 256 << 20
EMPTY_SLOT = 0
"""A slot that edits nothing; it pads plans with fewer edits than the widest of a batch."""
BOUNDS_AND_VALUES = 4
"""Numbers per neuron of a slot: low, high, scale and offset, in this order."""


@dataclass(eq=False)
class PlanSlots:
    """The slots of one plan, by block and in the order of its erasures. `scaled`: some scale is not 0.

    `evicted`: the slots hold another plan now.
    """

    blocks: Mapping[int, Sequence[int]]
    scaled: bool
    evicted: bool = False


class SlotTable:
    """Slots of one interval per neuron, each with the scale and offset of the values inside it.

    A slot is written once per plan and does not change until the plan is evicted, the least recently used first. The
    slots of a plan at one block are tried in order, and the first whose interval holds a value replaces it; so an
    erasure with K intervals per neuron would take K slots. Not thread-safe: it belongs to the thread of the model.

    Args:
        hidden_size: D.
        capacity: largest size in bytes. One plan always fits, whatever its size.
    """

    def __init__(self, hidden_size: int, device: torch.device | str, capacity: int = DEFAULT_BYTES) -> None:
        self._slot_bytes = hidden_size * (BOUNDS_AND_VALUES * 4 + 1)
        self._most_slots = capacity // self._slot_bytes
        self._plans: OrderedDict[str, PlanSlots] = OrderedDict()
        self._free: list[int] = []
        self.values = torch.zeros((1, BOUNDS_AND_VALUES, hidden_size), device=device)
        """[S, 4, D] float32."""
        self.values[EMPTY_SLOT, 0], self.values[EMPTY_SLOT, 1] = torch.inf, -torch.inf
        self.always = torch.zeros((1, hidden_size), dtype=torch.bool, device=device)
        """[S, D], neurons that are replaced whatever their value, NaN too."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.always.nbytes

    def fits(self, plans: Iterable[Plan]) -> bool:
        """Whether the table can hold these plans together."""
        distinct = {plan.key: plan for plan in plans}
        return len(distinct) <= 1 or 1 + sum(map(slots_needed, distinct.values())) <= self._most_slots

    def slots(self, plans: Sequence[Plan]) -> list[PlanSlots]:
        """The slots of each plan; plans that are not in the table are written.

        Args:
            plans: no more than fit; see `fits`.
        """
        keys = dict.fromkeys(plan.key for plan in plans)
        for key in keys:
            if key in self._plans:
                self._plans.move_to_end(key)
        missing = {plan.key: plan for plan in plans if plan.key not in self._plans}
        if missing:
            self._make_room(sum(map(slots_needed, missing.values())), keys)
        for key, plan in missing.items():
            self._plans[key] = self._write(plan)
        return [self._plans[plan.key] for plan in plans]

    def _make_room(self, needed: int, kept: Iterable[str]) -> None:
        """Free `needed` slots: grow up to the capacity, then evict plans that are not `kept`."""
        kept = set(kept)
        size = len(self.values)
        if len(self._free) < needed:
            self._grow(min(max(2 * size, size + needed - len(self._free)), self._most_slots))
        for key in [key for key in self._plans if key not in kept]:
            if len(self._free) >= needed:
                return
            evicted = self._plans.pop(key)
            evicted.evicted = True
            self._free += [slot for slots in evicted.blocks.values() for slot in slots]
        if len(self._free) < needed:  # one plan that is larger than the capacity
            self._grow(len(self.values) + needed - len(self._free))

    def _grow(self, size: int) -> None:
        before = len(self.values)
        if size <= before:
            return
        self.values = torch.cat([self.values, self.values.new_zeros((size - before, *self.values.shape[1:]))])
        self.always = torch.cat([self.always, self.always.new_zeros((size - before, self.always.shape[1]))])
        self._free += range(before, size)

    def _write(self, plan: Plan) -> PlanSlots:
        blocks: dict[int, list[int]] = {}
        for block, edits in plan.edits.items():
            slots = blocks[block] = [self._free.pop() for _ in range(len(edits.low))]
            at = torch.tensor(slots, device=self.values.device)
            values = np.stack([edits.low, edits.high, edits.scale, edits.offset], axis=1)
            self.values[at] = torch.from_numpy(values).to(self.values.device)
            self.always[at] = torch.from_numpy(edits.always).to(self.values.device)
        return PlanSlots(blocks, scaled=any(bool(edits.scale.any()) for edits in plan.edits.values()))

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The contents of `slots` [G, R]: low, high, scale and offset [G, R, 4, D], and `always` [G, R, D]."""
        return self.values[slots], self.always[slots]


def slots_needed(plan: Plan) -> int:
    """Slots of a plan over all blocks."""
    return sum(len(edits.low) for edits in plan.edits.values())
