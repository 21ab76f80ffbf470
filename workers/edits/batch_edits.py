"""The edits of one batch of variants, and the function that applies them to hidden states.

V: variants (rows of the batch), G: groups of n variants under one plan, R: slots of a plan at one block, T: tokens, D:
neurons.
"""

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from range_store.domain.erasure import Positions, Site
from range_store.domain.plan import Plan
from workers.edits.slot_table import EMPTY_SLOT, SlotTable
from workers.models.tokens import TokenBatch


class BatchEdits:
    """Edits variant v by `plans[v // repeats]`; see `workers.models.steerable.Edits`.

    After a pass, `masked` and `by_concept` count the neurons that were replaced at the read position. Several passes
    over the same texts are counted once.

    Args:
        table: the plans are written to it; no other plans may evict them before the pass.
        plans: at least one, none empty, all of one site.
        repeats: neighbouring variants that share a plan.
        positions: which tokens are edited.
        counted: whether to count.
    """

    def __init__(
        self,
        table: SlotTable,
        plans: Sequence[Plan],
        repeats: int = 1,
        positions: Positions = "all",
        *,
        counted: bool = True,
    ) -> None:
        self.positions = positions
        self.keys: Sequence[str] = [plan.key for plan in plans for _ in range(repeats)]
        if len(set(self.keys)) == 1:  # one group is broadcast over all variants, without a copy of its slots for each
            plans, repeats = plans[:1], len(self.keys)
        self._table, self._plans, self._repeats, self._counted = table, plans, repeats, counted
        self._slots = table.slots(plans)
        self._scaled = any(slots.scaled for slots in self._slots)
        self.layers: Collection[int] = sorted({block for slots in self._slots for block in slots.blocks})
        self._hits: dict[int, Tensor] = {}
        self._unions: dict[int, Tensor] = {}

    @property
    def site(self) -> Site:
        return self._plans[0].site

    def row(self, variant: int) -> "BatchEdits":
        """The edits of one variant, for a batch of one row; they are not counted here."""
        return BatchEdits(self._table, [self._plans[variant // self._repeats]], 1, self.positions, counted=False)

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """`hidden` [V, T, D] after block `layer`, edited at every real or read token and never at padding."""
        if any(slots.evicted for slots in self._slots):
            raise RuntimeError("a plan was evicted from the slot table before its batch ran")
        values, always = self._table.gather(self._index(layer))
        groups = (len(self._plans), self._repeats)
        if self._counted:
            at = torch.arange(len(hidden), device=hidden.device)
            read = hidden[at, batch.read].float().view(*groups, 1, -1)  # [G, n, 1, D]
            hit = _inside(read, values[:, None, :, 0], values[:, None, :, 1], always[:, None]).flatten(0, 1)
            self._hits[layer] = hit.sum(dim=-1)
            self._unions[layer] = hit.any(dim=1).sum(dim=-1)
        editable = editable_tokens(batch, self.positions).view(*groups, -1)
        edited = apply_edits(values, always, hidden.view(*groups, *hidden.shape[1:]), editable, self._scaled)
        return edited.flatten(0, 1)

    def _index(self, layer: int) -> Tensor:
        """Slots at one block, [G, R], R those of the widest plan."""
        rows = [slots.blocks.get(layer, ()) for slots in self._slots]
        width = max(map(len, rows))
        padded = [[*row, *[EMPTY_SLOT] * (width - len(row))] for row in rows]
        return torch.tensor(padded, device=self._table.values.device)

    @property
    def masked(self) -> Tensor:
        """Neurons replaced for each variant, whatever the concept, summed over blocks; [V] int64."""
        none = torch.zeros(len(self.keys), dtype=torch.int64, device=self._table.values.device)
        return sum(self._unions.values(), none)

    def by_concept(self) -> tuple[Counter[str], Counter[str]]:
        """Of the neurons of every variant at the read position: how many each concept replaced, and could have."""
        masked, possible = Counter[str](), Counter[str]()
        distinct = {plan.key: number for number, plan in enumerate(self._plans)}
        owner = torch.tensor([distinct[key] for key in self.keys])
        variants = torch.bincount(owner, minlength=len(self._plans)).tolist()
        hidden_size = self._table.values.shape[-1]
        for layer, hits in self._hits.items():
            totals = torch.zeros((len(self._plans), hits.shape[1]), dtype=torch.int64)
            totals.index_add_(0, owner, hits.cpu())
            for plan, counts, number in zip(self._plans, totals.tolist(), variants, strict=True):
                if not number:
                    continue
                concepts = [erasure.concept for erasure in plan.erasures if layer in erasure.layers]
                for concept, count in zip(concepts, counts, strict=False):  # the plan may be narrower than the widest
                    masked[concept] += count
                    possible[concept] += number * hidden_size
        return masked, possible


def editable_tokens(batch: TokenBatch, positions: Positions) -> Tensor:
    """Which tokens may be edited, [V, T] bool: real ones, or those of them that are read."""
    return batch.mask if positions == "all" else batch.mask & batch.is_read


def apply_edits(values: Tensor, always: Tensor, hidden: Tensor, editable: Tensor, scaled: bool) -> Tensor:
    """`hidden` [G, n, T, D] with every component that an interval holds replaced; a new tensor.

    Values are compared in float32, whatever the serving dtype: bounds cast to bfloat16 would move.

    Args:
        values: low, high, scale and offset of each slot, [G, R, 4, D]; the first slot that holds a value counts.
        always: [G, R, D], components that a slot replaces whatever their value.
        editable: [G, n, T], tokens that may be edited.
        scaled: some scale is not 0.
    """
    value = hidden.float()
    real = editable.unsqueeze(-1)
    result = hidden
    replaced: Tensor | None = None
    for r in range(values.shape[1]):
        low, high, scale, offset = values[:, r, :, None, None].unbind(dim=1)  # [G, 1, 1, D]
        hit = _inside(value, low, high, always[:, r, None, None]) & real
        first = hit if replaced is None else hit & ~replaced
        # where scale is 0 the value must not count at all: 0 · inf and 0 · NaN are NaN
        becomes = torch.where(scale == 0, offset, scale * value + offset) if scaled else offset
        result = torch.where(first, becomes.to(hidden.dtype), result)
        replaced = hit if replaced is None else replaced | hit
    return result


def _inside(value: Tensor, low: Tensor, high: Tensor, always: Tensor) -> Tensor:
    return ((value >= low) & (value <= high)) | always
