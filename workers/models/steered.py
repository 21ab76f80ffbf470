"""A transformers classifier split at any block: one trunk, many tails.

The model itself is left alone; a shallow copy with a site before each block runs trunks and tails. Trunks run on texts
end to end, without padding (`packing.py`), and the last block at the read position only. Tails that have blocks in them
run on padded texts.
"""

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from range_store.domain.erasure import Site
from workers.models.families import Family
from workers.models.label_token import LabelTokenClassifier
from workers.models.packing import ATTENTION, Packing
from workers.models.sites import EditOutput, ForwardPass, PassStopped, output_hooks, with_sites
from workers.models.steerable import Edits, SteerableModel, Trunk, ZeroAll, state_of
from workers.models.tokens import TokenBatch

logger = logging.getLogger(__name__)


class SteeredModel(SteerableModel):
    """A classifier with a head.

    Args:
        model: a transformers `…ForSequenceClassification` model, or a `LabelTokenClassifier`, in eval mode.
        family: how it is built.
        plain: run transformers' own padded passes, bit for bit, instead of packed ones.
    """

    def __init__(self, model: nn.Module, family: Family, *, plain: bool = False) -> None:
        super().__init__(model, family)
        self.packs = not plain and _takes_packed_attention(model)
        self._sited = with_sites(model, family.blocks, self.blocks, lambda: self._current)

    @property
    def keeps_trunks(self) -> bool:
        return self.splits

    def compile_blocks(self, batch: TokenBatch) -> bool:
        """See `SteerableModel`. Sites stand before compiled blocks then; hooks stay on the bare ones."""
        # on a CPU, weights are laid out once for oneDNN, as `prepack` does
        freezing: dict[str, Any] = {"freezing": batch.ids.device.type == "cpu"}

        def compiled(block: nn.Module) -> nn.Module:
            return cast(nn.Module, torch.compile(block, dynamic=True, options=freezing))

        before = self._sited
        self._sited = with_sites(self.model, self.family.blocks, map(compiled, self.blocks), lambda: self._current)
        if self.splits and self.agrees(batch):
            return True
        logger.warning("compiled blocks failed, or differ from the model's own: they are left as they are")
        self._sited = before
        return False

    def logits(self, batch: TokenBatch) -> Tensor:
        if batch.packing is not None and self.packs:
            logits = self.trunk(batch, self.n_layers - 1, whole=True).logits
            assert logits is not None
            return logits
        with self._lock:
            return self._call(self.model, batch)

    def record(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if self.splits and site == "block_output" and position == "read":
            trunks = self._trunks(batch, layers, whole=True)
            logits = trunks[0].logits
            assert logits is not None
            return logits, dict(zip(layers, (self._read_state(trunk, batch) for trunk in trunks), strict=True))
        recorded: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> Tensor:
            recorded[layer] = state_of(hidden, batch, position)
            return hidden

        return self._hooked(batch, layers, site, keep), recorded

    def _trunks(self, batch: TokenBatch, splits: Sequence[int], whole: bool) -> list[Trunk]:
        last = self.n_layers - 1
        if batch.packing is not None and self.packs:
            return self._packed_trunks(batch, batch.packing, splits, whole)
        now = ForwardPass(record=frozenset(splits), stop_after=None if whole else max(splits))
        logits = self._pass(now, batch)
        if last in now.recorded:
            now.recorded[last] = state_of(now.recorded[last], batch, "read").unsqueeze(1)
        return [Trunk(split, now.recorded[split], logits if whole else None) for split in splits]

    def _packed_trunks(self, batch: TokenBatch, packing: Packing, splits: Sequence[int], whole: bool) -> list[Trunk]:
        last = self.n_layers - 1
        end = last if whole else max(splits)
        now = ForwardPass(record={*splits, end}, stop_after=end, packing=packing, reads_only=last)
        with self._lock, packing.packed_attention(), suppress(PassStopped):
            self._current = now
            try:
                self._call_packed(batch, packing)
            finally:
                self._current = ForwardPass()
        states = {at: hidden.transpose(0, 1) if at == last else hidden for at, hidden in now.recorded.items()}
        logits = self._pass(ForwardPass(inject=(last, states[last])), batch.read_tokens()) if whole else None
        return [
            Trunk(split, states[split] if split == last else packing.padded(states[split]), logits) for split in splits
        ]

    def _read_state(self, trunk: Trunk, batch: TokenBatch) -> Tensor:
        """The states at the read position, [B, D]."""
        assert trunk.hidden is not None
        return trunk.hidden[:, 0] if trunk.split == self.n_layers - 1 else state_of(trunk.hidden, batch, "read")

    def _tail(self, batch: TokenBatch, split: int, hidden: Tensor, rows: Tensor, edits: Edits) -> Tensor:
        # the tail of the last block is a head that reads one token: only that token goes through it
        tail = (batch.read_tokens() if split == self.n_layers - 1 else batch).rows(rows)
        states = hidden[rows]
        if split in edits.layers:
            states = edits(split, states, tail)
        now = ForwardPass(
            inject=(split, states), edit=lambda layer, hidden: edits(layer, hidden, tail), edit_layers=edits.layers
        )
        return self._pass(now, tail)

    def hooked(self, batch: TokenBatch, edits: Edits) -> Tensor:
        return self._hooked(batch, edits.layers, edits.site, lambda layer, hidden: edits(layer, hidden, batch))

    def empty_logits(self, batch: TokenBatch) -> tuple[tuple[float, ...], ...]:
        first = torch.zeros(1, dtype=torch.int64, device=batch.ids.device)
        one = batch.rows(first)
        trunks = self.trunks(one, range(self.n_layers), whole=False)
        found = [self.steer(one, trunk, first, ZeroAll(layer))[0] for layer, trunk in enumerate(trunks)]
        return tuple(tuple(logits.float().tolist()) for logits in found)

    def check(self, batch: TokenBatch) -> None:
        self.packs = self.packs and self.agrees(batch)
        self.splits = self.packs or self.agrees(batch)

    def _pass(self, now: ForwardPass, batch: TokenBatch) -> Tensor:
        with self._lock:
            self._current = now
            try:
                return self._call(self._sited, batch)
            finally:
                self._current = ForwardPass()

    def _hooked(self, batch: TokenBatch, layers: Collection[int], site: Site, edit: EditOutput) -> Tensor:
        with self._lock, output_hooks(self._modules_at(layers, site), edit):
            return self._call(self.model, batch)

    def _call_packed(self, batch: TokenBatch, packing: Packing) -> None:
        config: Any = self.model.config
        first = config.pad_token_id + 1 if self.family.positions_after_pad else 0
        nothing = torch.zeros((1, 1, 1, 1), device=packing.ids.device)  # a mask made already: attention makes its own
        with torch.inference_mode():
            self._sited(
                input_ids=packing.ids,
                attention_mask=nothing,
                position_ids=packing.positions + first,
                **self._more(batch, packing.type_ids),
            )

    def _call(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        more = self._more(batch, batch.type_ids)
        with torch.inference_mode():
            output = model(input_ids=batch.ids, attention_mask=batch.mask.to(torch.int64), **more)
        logits: Tensor = output.logits
        return logits

    def _more(self, batch: TokenBatch, type_ids: Tensor | None) -> dict[str, Any]:
        """Arguments of a forward call beside ids and mask. Without a pair no type ids, as if there were no pairs."""
        reads = {"read": batch.read} if isinstance(self.model, LabelTokenClassifier) else {}
        types = {} if type_ids is None else {"token_type_ids": type_ids}
        return {**reads, **types, **self.family.call}


def _takes_packed_attention(model: nn.Module) -> bool:
    """Switch the model to the attention of `packing.py`, if it lets its attention be chosen."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner.set_attn_implementation(ATTENTION)
    return bool(inner.config._attn_implementation == ATTENTION)
