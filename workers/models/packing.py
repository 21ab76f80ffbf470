"""Texts of a batch end to end, without padding: one row of N tokens in place of [B, T].

Everything in a transformer but attention looks at one token at a time, so a block takes the packed row as it is.
Attention is registered with transformers under `ATTENTION` and lays queries, keys and values out text by text for its
own matrix products alone, which are a few percent of the work. Outside of `Packing.everywhere` and `Packing.at_reads`
it is transformers' own `sdpa` attention, to the bit.

B: texts, T: tokens of the longest, N: tokens of all, H: heads, D: hidden size, d: of one head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "neuronlens"
"""Name of the attention that understands packed texts."""

Attention = Callable[..., tuple[Tensor, None]]

_now: ContextVar[Attention | None] = ContextVar("packed attention", default=None)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of B texts lie, packed and padded.

    Attributes:
        ids: [1, N]. positions: [1, N], of each token in its own text, from 0.
        reads: [B], place of each text's read position in the packed row.
        grid: [B, T], place of each token of the padded batch in the packed row; on padding, the text's first token.
        places: [N], the other way round, into the flattened padded batch.
        real: [B, 1, 1, T] bool, keys that are no padding; None where no text is padded.
        before_read: [B, 1, 1, T] bool, keys that the token at the read position may see in causal attention.
    """

    ids: Tensor
    positions: Tensor
    reads: Tensor
    grid: Tensor
    places: Tensor
    real: Tensor | None
    before_read: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, read: Tensor) -> "Packing":
        """That of a right-padded batch: ids, mask [B, T]; read [B]."""
        lengths = mask.sum(dim=1)
        starts = (lengths.cumsum(dim=0) - lengths).unsqueeze(1)
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        columns = column.unsqueeze(1).unsqueeze(1)
        return cls(
            ids=ids[mask].unsqueeze(0),
            positions=column[mask].unsqueeze(0),
            reads=starts.squeeze(1) + read,
            grid=starts + column * mask,
            places=mask.flatten().nonzero().squeeze(1),
            real=None if bool(mask.all()) else mask.unsqueeze(1).unsqueeze(1),
            before_read=columns <= read.view(-1, 1, 1, 1),
        )

    def to(self, device: torch.device | str) -> "Packing":
        """The same on another device."""
        return Packing(
            self.ids.to(device),
            self.positions.to(device),
            self.reads.to(device),
            self.grid.to(device),
            self.places.to(device),
            None if self.real is None else self.real.to(device),
            self.before_read.to(device),
        )

    def padded(self, hidden: Tensor) -> Tensor:
        """Packed states [1, N, …] as [B, T, …]; padding holds states of the text's first token."""
        return hidden[0].index_select(0, self.grid.flatten()).view(*self.grid.shape, *hidden.shape[2:])

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, blocks take and give packed states of every token."""

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            query, key, value = self._apart(query), self._apart(key), self._apart(value)
            mask = None if _is_causal(module, options) else self.real  # right padding is never seen looking back
            given, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
            return given.flatten(0, 1).index_select(0, self.places).unsqueeze(0), None

        with _attending(attend):
            yield

    def at_reads(self, block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What `block` gives at the read positions, [1, B, D], out of the packed states [1, N, D].

        Keys and values are needed of all tokens; all else, the larger part of a block, of those that are read. The
        block starts on all tokens, is left as soon as its keys and values are known, and runs again on the states
        that are read, with those keys and values in place of its own.
        """
        kept: list[Tensor] = []

        def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            kept.extend((self._apart(key), self._apart(value)))
            raise _KeysAndValues

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            mask = self.before_read if _is_causal(module, options) else self.real
            keys, values = kept
            given, _ = sdpa_attention_forward(module, query.permute(2, 1, 0, 3), keys, values, mask, **options)
            return given.transpose(0, 1), None

        def read(part: Any) -> Any:
            """Tensors [1, N, …], which speak of each token, cut down to [1, B, …]; all else as it is."""
            if isinstance(part, tuple):
                return tuple(map(read, part))
            if isinstance(part, Tensor) and part.ndim > 1 and part.shape[:2] == self.ids.shape:
                return part.index_select(1, self.reads)
            return part

        try:
            with _attending(keep):
                block(hidden, *args, **kwargs)
        except _KeysAndValues:
            pass
        with _attending(attend):
            output = block(read(hidden), *map(read, args), **{name: read(part) for name, part in kwargs.items()})
        assert isinstance(output, Tensor)
        return output

    def _apart(self, states: Tensor) -> Tensor:
        """[1, H, N, d] as [B, H, T, d]."""
        return self.padded(states.transpose(1, 2)).transpose(1, 2)


class _KeysAndValues(BaseException):
    """No error: a block has computed its keys and values, and is left."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    packed = _now.get()
    if packed is not None:
        return packed(module, query, key, value, **options)
    given: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return given


@contextmanager
def _attending(attend: Attention) -> Iterator[None]:
    before = _now.set(attend)
    try:
        yield
    finally:
        _now.reset(before)


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    if options.get("sliding_window") is not None:
        raise TypeError("attention over a window cannot be packed")
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
