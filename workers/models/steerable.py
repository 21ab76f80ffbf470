"""What every kind of model can do: run split at any block, as one trunk and many tails, or in full with hooks.

B: texts of a batch, V: variants (rows of the tail), T: tokens, D: hidden size, K: labels.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from range_store.domain.erasure import Positions, Site
from workers.models.families import Family
from workers.models.predictions import Head
from workers.models.sites import ForwardPass
from workers.models.tokens import TokenBatch

SPLIT_TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Largest difference of logits, relative to max(1, |logit|), between tail and hooked full pass at load."""


class Edits(Protocol):
    """Edits to the hidden states of V variants at some blocks."""

    @property
    def layers(self) -> Collection[int]:
        """The blocks whose output is edited."""
        ...

    @property
    def site(self) -> Site:
        """Where in those blocks."""
        ...

    @property
    def positions(self) -> Positions:
        """Which tokens are edited."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """Plan key of each variant; equal keys mean equal edits."""
        ...

    def row(self, variant: int) -> "Edits":
        """The edits of one variant, for a batch of one row."""
        ...

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """Edited `hidden` [V, T, D]; a new tensor. `batch` [V, T] says which tokens are real and which is read."""
        ...


ModulesAt = Callable[[Collection[int], Site], dict[int, nn.Module]]


@dataclass(frozen=True, eq=False)
class Trunk:
    """Hidden states after block `split`, and the bare model's logits [B, K] if the pass went to the end.

    hidden: [B, T, D]; after the last block, of which a head reads one token, [B, 1, D], at the read position. None,
    like `split`, where nothing can be shared: then every variant is a full pass.
    """

    split: int | None
    hidden: Tensor | None
    logits: Tensor | None


class SteerableModel(ABC):
    """A classifier whose hidden states can be recorded and edited at any block.

    One forward pass at a time: calls from several threads wait for each other.

    Attributes:
        n_layers: blocks.
        splits: variants run as trunk and tail; else as full passes with hooks, which is slower.
        packs: trunks run on packed texts, without padding.
        prefix: token ids before every text.
        head: how the logits are read, where the checkpoint does not decide.
    """

    language_model: ClassVar[bool] = False
    """Whether it gives texts a likelihood; see `negative_log_likelihood`."""
    packs = False
    prefix: tuple[int, ...] = ()
    head: Head | None = None

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.n_layers = len(blocks)
        self.splits = True
        self._current = ForwardPass()
        self._lock = threading.RLock()

    @property
    def shares_trunks(self) -> bool:
        """Whether variants of a text can share a trunk."""
        return self.splits

    @property
    def keeps_trunks(self) -> bool:
        """Whether a trunk holds one row of states per token of each text, so that it can be kept for later batches."""
        return False

    def split_for(self, layers: Collection[int], site: Site) -> int | None:
        """The block to split at for edits of `layers`: the lowest, the last one for none; None for full passes."""
        if not self.shares_trunks or site != "block_output":
            return None
        return min(layers, default=self.n_layers - 1)

    def tail_width(self, batch: TokenBatch, split: int | None) -> int:
        """Padded tokens of one variant in the tail above block `split`."""
        return 1 if split == self.n_layers - 1 and self.shares_trunks else batch.ids.shape[1]

    def trunk(self, batch: TokenBatch, split: int | None, *, whole: bool) -> Trunk:
        """Hidden states after block `split`; see `trunks`."""
        return self.trunks(batch, [split], whole=whole)[0]

    def trunks(self, batch: TokenBatch, splits: Sequence[int | None], *, whole: bool) -> list[Trunk]:
        """Hidden states after each of `splits`, all from one pass.

        Args:
            splits: see `split_for`; all None, or none of them.
            whole: go on to the end, for the bare model's logits (bit for bit); else the blocks above the highest
                split are skipped.
        """
        blocks = [split for split in splits if split is not None]
        if self.shares_trunks and blocks:
            return self._trunks(batch, blocks, whole)
        logits = self.logits(batch) if whole else None
        return [Trunk(None, None, logits) for _ in splits]

    def steer(self, batch: TokenBatch, trunk: Trunk, rows: Tensor, edits: Edits) -> Tensor:
        """Logits [V, K] of edited variants of the trunk's texts.

        Args:
            rows: the text of each variant, [V] int64.
            edits: at `trunk.split` or above.
        """
        if trunk.split is None or trunk.hidden is None or edits.site != "block_output":
            return self._full_pass(batch.rows(rows), edits)
        return self._tail(batch, trunk.split, trunk.hidden, rows, edits)

    @abstractmethod
    def logits(self, batch: TokenBatch) -> Tensor:
        """The bare model's logits, [B, K]."""

    @abstractmethod
    def record(
        self,
        batch: TokenBatch,
        layers: Sequence[int],
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Bare logits [B, K], and per block the states [B, D] at the read position, or their mean over real tokens."""

    @abstractmethod
    def hooked(self, batch: TokenBatch, edits: Edits) -> Tensor:
        """Logits [B, K] of full passes of the bare model with a hook on each edited block: the reference."""

    @abstractmethod
    def check(self, batch: TokenBatch) -> None:
        """Compare trunk and tail with hooked full passes at every block, and give up what makes them differ.

        Run once at load, on a small padded batch; it sets `splits` and `packs`.
        """

    @abstractmethod
    def _trunks(self, batch: TokenBatch, splits: Sequence[int], whole: bool) -> list[Trunk]: ...

    @abstractmethod
    def _tail(self, batch: TokenBatch, split: int, hidden: Tensor, rows: Tensor, edits: Edits) -> Tensor: ...

    def _full_pass(self, batch: TokenBatch, edits: Edits) -> Tensor:
        return self.hooked(batch, edits)

    def compile_blocks(self, batch: TokenBatch) -> bool:
        """Compile each block with `torch.compile`, if what that gives equals the bare blocks; returns whether."""
        return False

    def empty_logits(self, batch: TokenBatch) -> tuple[tuple[float, ...], ...]:
        """Logits of a text whose states are all zero after a block, for each block; empty if the model has none.

        Args:
            batch: of any text.
        """
        return ()

    @property
    def text_start(self) -> tuple[int, ...]:
        """Token ids before a text that stands by itself, for a `language_model`."""
        return ()

    def negative_log_likelihood(self, batch: TokenBatch, edits: Edits | None) -> float:
        """Sum over all tokens of the texts but the first of each, in nats; for a `language_model`."""
        raise NotImplementedError(f"{type(self).__name__} is no language model")

    def _modules_at(self, layers: Collection[int], site: Site) -> dict[int, nn.Module]:
        """What gives the output at a site of each block."""
        blocks = {layer: self.blocks[layer] for layer in layers}
        if site == "block_output":
            return blocks
        return {layer: block.get_submodule(self.family.mlp) for layer, block in blocks.items()}

    def agrees(self, batch: TokenBatch) -> bool:
        """Whether trunk and tail give the logits of hooked full passes, at every block."""
        tolerance = SPLIT_TOLERANCE.get(next(self.model.parameters()).dtype, 1e-5)
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        try:
            for layer in range(self.n_layers):
                edits = ZeroNegativeOdd(layer)
                split = self.steer(batch, self.trunk(batch, layer, whole=False), rows, edits).float()
                full = self.hooked(batch, edits).float()
                if not bool(((split - full).abs() <= tolerance * full.abs().clamp(min=1)).all()):
                    return False
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, KeyError, RuntimeError, IndexError):
            return False
        return True


class ZeroNegativeOdd:
    """Edits for `check` in which every neuron and token takes part: negative values of odd neurons become 0."""

    site: Site = "block_output"
    positions: Positions = "all"
    keys: Sequence[str] = ()

    def __init__(self, layer: int) -> None:
        self.layers = (layer,)

    def row(self, variant: int) -> "ZeroNegativeOdd":
        return self

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        odd = torch.arange(hidden.shape[-1], device=hidden.device) % 2 == 1
        return torch.where((hidden < 0) & odd & batch.mask.unsqueeze(-1), torch.zeros_like(hidden), hidden)


class ZeroAll(ZeroNegativeOdd):
    """Every neuron of every token becomes 0."""

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        return torch.where(batch.mask.unsqueeze(-1), torch.zeros_like(hidden), hidden)


def state_of(hidden: Tensor, batch: TokenBatch, position: Literal["read", "mean"]) -> Tensor:
    """One state per text, [B, D], out of `hidden` [B, T, D]: at the read position, or the mean over real tokens."""
    if position == "read":
        return hidden[torch.arange(len(hidden), device=hidden.device), batch.read]
    real = batch.mask.unsqueeze(-1)
    return ((hidden * real).sum(dim=1, dtype=torch.float32) / real.sum(dim=1)).to(hidden.dtype)
