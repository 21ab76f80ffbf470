"""A transformers classifier split at any block: one trunk, many tails (DESIGN "The engine").

The model itself is left alone. A shallow copy of it shares every weight, but each block stands behind a `Site`,
which can record the block's output, put cached hidden states in its place, skip it, or mask what it gives. The
block list keeps its length, so models that look things up by block index (Qwen2's layer types) stay right.

Trunks run on texts end to end, without padding (`packing.py`), and the last block at the read position only. Tails
that have blocks in them run on padded texts.

B: texts of a batch, V: variants (rows of the tail), T: tokens, D: hidden size, K: labels.
"""

import copy
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from range_store.domain.erasure import Positions, Site
from workers.models.families import Family
from workers.models.label_token import LabelTokenClassifier
from workers.models.packing import ATTENTION, Packing
from workers.models.tokens import TokenBatch

logger = logging.getLogger(__name__)

SPLIT_TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Largest difference of logits, relative to max(1, |logit|), between tail and hooked full pass at load."""


class Masking(Protocol):
    """Something that masks hidden states of V variants at some layers."""

    @property
    def layers(self) -> Collection[int]:
        """The blocks whose output it changes."""
        ...

    @property
    def site(self) -> Site:
        """Where in those blocks."""
        ...

    @property
    def positions(self) -> Positions:
        """Which tokens it masks."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Of each variant: those of one key are masked alike."""
        ...

    def row(self, variant: int) -> "Masking":
        """The masking of one variant, for a batch of one row."""
        ...

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """Masked `hidden` [V, T, D]; a new tensor. `batch` [V, T] says which tokens are real and which is read."""
        ...


@dataclass(frozen=True, eq=False)
class Trunk:
    """Hidden states after block `split`, and the bare model's logits [B, K] if the pass went to the end.

    hidden: [B, T, D]; after the last block, of which a head reads one token, [B, 1, D], at the read position.
    """

    split: int
    hidden: Tensor
    logits: Tensor | None


@dataclass
class Pass:
    """What the sites do during one forward pass."""

    record: Collection[int] = ()
    stop_after: int | None = None
    inject: tuple[int, Tensor] | None = None
    mask: Callable[[int, Tensor], Tensor] | None = None
    mask_layers: Collection[int] = ()
    recorded: dict[int, Tensor] = field(default_factory=dict)
    packing: Packing | None = None
    at_reads: int | None = None


class _Stop(BaseException):
    """No error: a packed pass has recorded all that it was to, and is left."""


class _Passing(Protocol):
    current: Pass


class BlockSite(nn.Module):
    """Stands in for block `index`; attributes that a model reads off its blocks are the block's."""

    def __init__(self, index: int, block: nn.Module, model: "_Passing") -> None:
        super().__init__()
        self.index = index
        self.block = block
        self.__dict__["steered"] = model  # not a submodule: the model holds the site, not the other way round

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now: Pass = self.__dict__["steered"].current
        if now.inject is not None and self.index <= now.inject[0]:
            return now.inject[1] if self.index == now.inject[0] else hidden
        if now.stop_after is not None and self.index > now.stop_after:
            return hidden
        if now.packing is not None and self.index == now.at_reads:
            output: Tensor = now.packing.at_reads(self.block, hidden, *args, **kwargs)
        else:
            output = self.block(hidden, *args, **kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(f"block {self.index} returns {type(output).__name__}, not a tensor")
        if now.mask is not None and self.index in now.mask_layers:
            output = now.mask(self.index, output)
        if self.index in now.record:
            now.recorded[self.index] = output
        if now.packing is not None and self.index == now.stop_after:
            raise _Stop
        return output


class SteeredModel:
    """A classifier whose activations can be recorded and masked at any block.

    One forward pass at a time: calls from several threads wait for each other.

    Args:
        model: a transformers `…ForSequenceClassification` model, or a `LabelTokenClassifier`, in eval mode.
        family: how it is built.
        plain: run transformers' own padded passes, bit for bit, instead of packed ones.
    """

    def __init__(self, model: nn.Module, family: Family, *, plain: bool = False) -> None:
        self.model = model
        self.family = family
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.n_layers = len(blocks)
        self.splits = True
        self.packs = not plain and _takes_packed_attention(model)
        self.current = Pass()
        self._lock = threading.Lock()
        self._sited = self._with_sites(blocks)

    def _with_sites(self, blocks: Iterable[nn.Module]) -> nn.Module:
        """A shallow copy of the model with sites before `blocks`."""
        sites = nn.ModuleList(BlockSite(index, block, self) for index, block in enumerate(blocks))
        return with_submodule(self.model, self.family.blocks.split("."), sites)

    def compile_blocks(self, batch: TokenBatch) -> bool:
        """Compile each block with `torch.compile`, if what that gives equals the bare blocks.

        The sites stand before compiled blocks then; hooks stay on the bare ones, which the reference passes run.

        Returns:
            Whether it worked; if not, the log says why, and the blocks stay as they were.
        """
        # on a CPU, weights are laid out once for oneDNN, as `prepack` does
        freezing: dict[str, Any] = {"freezing": batch.ids.device.type == "cpu"}

        def compiled(block: nn.Module) -> nn.Module:
            return cast(nn.Module, torch.compile(block, dynamic=True, options=freezing))

        before = self._sited
        self._sited = self._with_sites(map(compiled, self.blocks))
        if self.splits and self._agrees(batch):
            return True
        logger.warning("compiled blocks failed, or differ from the model's own: they are left as they are")
        self._sited = before
        return False

    def tail_width(self, batch: TokenBatch, split: int) -> int:
        """Padded tokens of one variant in the tail above block `split`."""
        return 1 if split == self.n_layers - 1 and self.splits else batch.ids.shape[1]

    def logits(self, batch: TokenBatch) -> Tensor:
        """The bare model's logits, [B, K]."""
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
        """Bare logits [B, K], and per layer the states [B, D] at the read position, or their mean over real tokens."""
        if self.splits and site == "block_output":
            if position == "read":
                trunks = self.trunks(batch, layers, whole=True)
                logits = trunks[0].logits
                assert logits is not None
                return logits, {trunk.split: self._read_state(trunk, batch) for trunk in trunks}
            now = Pass(record=frozenset(layers))
            logits = self._pass(now, batch)
            return logits, {layer: state_of(now.recorded[layer], batch, position) for layer in layers}
        recorded: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> Tensor:
            recorded[layer] = state_of(hidden, batch, position)
            return hidden

        return self._hooked(batch, layers, site, keep), recorded

    def trunk(self, batch: TokenBatch, split: int, *, whole: bool) -> Trunk:
        """Hidden states after block `split`; see `trunks`."""
        return self.trunks(batch, [split], whole=whole)[0]

    def trunks(self, batch: TokenBatch, splits: Sequence[int], *, whole: bool) -> list[Trunk]:
        """Hidden states after each of `splits`, all from one pass.

        Args:
            whole: go on to the end, for the bare model's logits (bit for bit); else the blocks above the highest
                split are skipped.
        """
        if not self.splits:  # nothing to share: `steer` runs whole passes
            empty = torch.empty(0, device=batch.ids.device)
            logits = self.logits(batch) if whole else None
            return [Trunk(split, empty, logits) for split in splits]
        last = self.n_layers - 1
        if batch.packing is not None and self.packs:
            return self._packed_trunks(batch, batch.packing, splits, whole)
        now = Pass(record=frozenset(splits), stop_after=None if whole else max(splits))
        logits = self._pass(now, batch)
        if last in now.recorded:
            now.recorded[last] = state_of(now.recorded[last], batch, "read").unsqueeze(1)
        return [Trunk(split, now.recorded[split], logits if whole else None) for split in splits]

    def _packed_trunks(self, batch: TokenBatch, packing: Packing, splits: Sequence[int], whole: bool) -> list[Trunk]:
        last = self.n_layers - 1
        end = last if whole else max(splits)
        now = Pass(record={*splits, end}, stop_after=end, packing=packing, at_reads=last)
        with self._lock, packing.everywhere():
            self.current = now
            try:
                self._call_packed(batch, packing)
            except _Stop:
                pass
            finally:
                self.current = Pass()
        states = {at: hidden.transpose(0, 1) if at == last else hidden for at, hidden in now.recorded.items()}
        logits = self._pass(Pass(inject=(last, states[last])), batch.read_tokens()) if whole else None
        return [
            Trunk(split, states[split] if split == last else packing.padded(states[split]), logits) for split in splits
        ]

    def _read_state(self, trunk: Trunk, batch: TokenBatch) -> Tensor:
        """Of a trunk's hidden states, those at the read position, [B, D]."""
        if trunk.split == self.n_layers - 1:
            return trunk.hidden[:, 0]
        return state_of(trunk.hidden, batch, "read")

    def steer(self, batch: TokenBatch, trunk: Trunk, rows: Tensor, masking: Masking) -> Tensor:
        """Logits [V, K] of masked variants of the trunk's texts.

        At the last block the tail is a head that reads one token, so only that token goes through it; what other
        tokens' states would have become cannot matter any more.

        Args:
            rows: the text of each variant, [V] int64.
            masking: its layers are `trunk.split` or above.
        """
        if not self.splits or masking.site != "block_output":
            return self.hooked(batch.rows(rows), masking)
        tail = (batch.read_tokens() if trunk.split == self.n_layers - 1 else batch).rows(rows)
        hidden = trunk.hidden[rows]
        if trunk.split in masking.layers:
            hidden = masking(trunk.split, hidden, tail)
        now = Pass(
            inject=(trunk.split, hidden),
            mask=lambda layer, states: masking(layer, states, tail),
            mask_layers=masking.layers,
        )
        return self._pass(now, tail)

    def hooked(self, batch: TokenBatch, masking: Masking) -> Tensor:
        """Logits [B, K] of a full pass of the bare model with a masking hook on each masked block: the reference."""
        return self._hooked(batch, masking.layers, masking.site, lambda layer, hidden: masking(layer, hidden, batch))

    def empty_logits(self, batch: TokenBatch) -> Tensor:
        """What is left of any text, [n_layers, K]: the logits where all states after a block are zero, for each block.

        Args:
            batch: of any text.
        """
        first = torch.zeros(1, dtype=torch.int64, device=batch.ids.device)
        one = batch.rows(first)
        trunks = self.trunks(one, range(self.n_layers), whole=False)
        return torch.cat([self.steer(one, trunk, first, AllZero(trunk.split)) for trunk in trunks])

    def check(self, batch: TokenBatch) -> None:
        """Compares trunk and tail with hooked full passes at every block, and gives up what makes them differ.

        Run once at load on a small padded batch. Afterwards `packs` says whether trunks run on packed texts, and
        `splits` whether the model is split, or runs masked variants as hooked full passes (slower, and right).
        """
        if self.packs and not self._agrees(batch):
            self.packs = False
        self.splits = self._agrees(batch)

    def _agrees(self, batch: TokenBatch) -> bool:
        tolerance = SPLIT_TOLERANCE.get(next(self.model.parameters()).dtype, 1e-5)
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        try:
            for layer in range(self.n_layers):
                masking = HalfZero(layer)
                split = self.steer(batch, self.trunk(batch, layer, whole=False), rows, masking).float()
                full = self.hooked(batch, masking).float()
                if not bool(((split - full).abs() <= tolerance * full.abs().clamp(min=1)).all()):
                    return False
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, KeyError, RuntimeError, IndexError):
            return False
        return True

    def _pass(self, now: Pass, batch: TokenBatch) -> Tensor:
        with self._lock:
            self.current = now
            try:
                return self._call(self._sited, batch)
            finally:
                self.current = Pass()

    def _hooked(
        self, batch: TokenBatch, layers: Collection[int], site: Site, change: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        def hook(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
            def apply(module: nn.Module, args: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (change(layer, output[0]), *output[1:])
                return change(layer, output)

            return apply

        with self._lock:
            handles = [self._place(layer, site).register_forward_hook(hook(layer)) for layer in layers]
            try:
                return self._call(self.model, batch)
            finally:
                for handle in handles:
                    handle.remove()

    def _place(self, layer: int, site: Site) -> nn.Module:
        block = self.blocks[layer]
        return block if site == "block_output" else block.get_submodule(self.family.mlp)

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
        """What a forward call takes beside ids and a mask. Without a pair no type ids, as if there were no pairs."""
        reads = {"read": batch.read} if isinstance(self.model, LabelTokenClassifier) else {}
        types = {} if type_ids is None else {"token_type_ids": type_ids}
        return {**reads, **types, **self.family.call}


def _takes_packed_attention(model: nn.Module) -> bool:
    """Switches the model to the attention of `packing.py`, if it lets its attention be chosen."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner.set_attn_implementation(ATTENTION)
    return bool(inner.config._attn_implementation == ATTENTION)


class HalfZero:
    """A masking for `check` that every neuron and token takes part in: negative values of odd neurons become 0."""

    site: Site = "block_output"
    positions: Positions = "all"
    keys: Sequence[str] = ()

    def __init__(self, layer: int) -> None:
        self.layers = (layer,)

    def row(self, variant: int) -> "HalfZero":
        return self

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        odd = torch.arange(hidden.shape[-1], device=hidden.device) % 2 == 1
        return torch.where((hidden < 0) & odd & batch.mask.unsqueeze(-1), torch.zeros_like(hidden), hidden)


class AllZero(HalfZero):
    """Every neuron of every token becomes 0."""

    def row(self, variant: int) -> "AllZero":
        return self

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        return torch.where(batch.mask.unsqueeze(-1), torch.zeros_like(hidden), hidden)


def state_of(hidden: Tensor, batch: TokenBatch, position: Literal["read", "mean"]) -> Tensor:
    """One state per text, [B, D], out of `hidden` [B, T, D]: at the read position, or the mean over real tokens."""
    if position == "read":
        return hidden[torch.arange(len(hidden), device=hidden.device), batch.read]
    real = batch.mask.unsqueeze(-1)
    return ((hidden * real).sum(dim=1, dtype=torch.float32) / real.sum(dim=1)).to(hidden.dtype)


def with_submodule(module: nn.Module, path: list[str], replacement: nn.Module) -> nn.Module:
    """A shallow copy of `module` that shares every weight, with another submodule at `path`."""
    if not path:
        return replacement
    clone = copy.copy(module)
    child = with_submodule(module.get_submodule(path[0]), path[1:], replacement)
    clone.__dict__["_modules"] = {**module._modules, path[0]: child}
    return clone
