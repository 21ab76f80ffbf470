"""Texts of a batch end to end, without padding: one row of N tokens in place of [B, T].

Everything in a transformer but attention looks at one token at a time, so a block takes the packed row as it is.
Attention is registered with transformers under `ATTENTION` and lays queries, keys and values out text by text for its
own matrix products alone, which are a few percent of the work; on a GPU, in half precision, a kernel for texts of
varying length takes them as they lie. Outside of `Packing.packed_attention` and `Packing.run_at_reads` it is
transformers' own `sdpa` attention, to the bit.

A packed row is filled up to one of a few sizes (`prepack.rounded`) with tokens that nothing looks at.

B: texts, T: tokens of the longest, N: tokens of all, the filling included, H: heads, D: hidden size, d: of one head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workers.models.prepack import rounded

ATTENTION = "neuronlens"
"""Name of the attention that understands packed texts."""

LENGTH_RATIO, LENGTH_MARGIN = 1.25, 4
"""Texts are of like length if the longest has at most 1.25 times the tokens of the shortest, plus 4."""

Attention = Callable[..., tuple[Tensor, None]]

_current: ContextVar[Attention | None] = ContextVar("packed attention", default=None)


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring texts of like length, which attention takes together: rows [b] of the batch, t tokens the longest.

    Attributes:
        rows: which of the B texts. tokens: which of the N tokens.
        grid: [b, t], place in the packed row of each token as if padded; on padding, the text's first token.
        places: [n], the other way round, into the flattened grid.
        real: [b, 1, 1, t] bool, keys that are no padding.
        before_read: [b, 1, 1, t] bool, keys that the token at the read position may see in causal attention.
        padded: some text is shorter than t.
    """

    rows: slice
    tokens: slice
    grid: Tensor
    places: Tensor
    real: Tensor
    before_read: Tensor
    padded: bool

    def to(self, device: torch.device | str) -> "Group":
        """The same on another device."""
        return replace(self, **_moved(self, device))

    def unpack(self, states: Tensor) -> Tensor:
        """[1, H, N, d] as [b, H, t, d]."""
        own = states[0].transpose(0, 1)
        own = own.index_select(0, self.grid.flatten()) if self.padded else own[self.tokens]
        return own.view(*self.grid.shape, *own.shape[1:]).transpose(1, 2)

    def pack(self, states: Tensor) -> Tensor:
        """[b, t, H, d] as [n, H, d]."""
        flat = states.flatten(0, 1)
        return flat.index_select(0, self.places) if self.padded else flat


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of B texts lie, packed and padded.

    Attributes:
        ids: [1, N]. positions: [1, N], of each token in its own text, from 0. type_ids: [1, N], token type ids, if any.
        reads: [B], place of each text's read position in the packed row.
        grid: [B, T], place of each token of the padded batch in the packed row; on padding, the text's first token.
        groups: all texts, in their order, where attention is computed text by text.
        starts: [B + 1] int32, place of each text's first token, and of the first that belongs to no text.
        longest: tokens of the longest text.
        filling: how many tokens at the end of the row belong to no text.
    """

    ids: Tensor
    positions: Tensor
    reads: Tensor
    grid: Tensor
    groups: tuple[Group, ...]
    starts: Tensor
    longest: int
    filling: int
    type_ids: Tensor | None = None

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, read: Tensor, type_ids: Tensor | None = None) -> "Packing":
        """The packing of a right-padded batch: ids, mask, type_ids [B, T]; read [B]."""
        lengths = mask.sum(dim=1)
        edges = F.pad(lengths.cumsum(dim=0), (1, 0))
        starts = edges[:-1]
        column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        grid = starts.unsqueeze(1) + column * mask
        groups = []
        for rows in _like_lengths(lengths.tolist()):
            width = int(lengths[rows].max())
            real = mask[rows, :width]
            first = int(starts[rows.start])
            groups.append(
                Group(
                    rows,
                    slice(first, first + int(lengths[rows].sum())),
                    grid[rows, :width],
                    real.flatten().nonzero().squeeze(1),
                    real[:, None, None],
                    (column[rows, :width] <= read[rows].unsqueeze(1))[:, None, None],
                    padded=not bool(real.all()),
                )
            )
        packed, positions = ids[mask], column[mask]
        filling = rounded(len(packed)) - len(packed)
        packed, positions = (F.pad(each, (0, filling)).unsqueeze(0) for each in (packed, positions))
        types = None if type_ids is None else F.pad(type_ids[mask], (0, filling)).unsqueeze(0)
        edges = edges.to(torch.int32)
        return cls(packed, positions, starts + read, grid, tuple(groups), edges, ids.shape[1], filling, types)

    def to(self, device: torch.device | str) -> "Packing":
        """The same on another device."""
        return replace(self, groups=tuple(group.to(device) for group in self.groups), **_moved(self, device))

    def padded(self, hidden: Tensor) -> Tensor:
        """Packed states [1, N, …] as [B, T, …]; padding holds states of the text's first token."""
        return hidden[0].index_select(0, self.grid.flatten()).view(*self.grid.shape, *hidden.shape[2:])

    @contextmanager
    def packed_attention(self) -> Iterator[None]:
        """Inside, attention runs on packed states of every token."""

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            causal = _is_causal(module, options)
            if takes_varying_lengths(query):
                return self._varying_lengths(query, key, value, causal, options.get("scaling")), None
            parts = []
            for group in self.groups:
                # causal attention never sees right padding, and needs no mask
                mask = group.real if group.padded and not causal else None
                own = (group.unpack(query), group.unpack(key), group.unpack(value))
                parts.append(group.pack(sdpa_attention_forward(module, *own, mask, **options)[0]))
            if self.filling:
                parts.append(parts[0].new_zeros((self.filling, *parts[0].shape[1:])))
            return torch.cat(parts).unsqueeze(0), None

        with _attending(attend):
            yield

    def _varying_lengths(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
        """Attention [1, N, H, d] of all texts in one kernel; the filling attends to itself, like a text of its own."""
        starts, longest = self.starts, self.longest
        if self.filling:
            starts, longest = F.pad(starts, (0, 1), value=query.shape[2]), max(longest, self.filling)
        queries, keys, values = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
        output = varlen_attn(
            queries,
            keys,
            values,
            starts,
            starts,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return cast(Tensor, output).unsqueeze(0)

    def run_at_reads(self, block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of `block` at the read positions, [1, B, D], for the packed states [1, N, D].

        Keys and values are needed for all tokens; everything else, the larger part of a block, only for those that are
        read. The block starts on all tokens and is stopped as soon as its keys and values are known; then it runs again
        on the states that are read, with those keys and values in place of its own.
        """
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            kept.extend((group.unpack(key), group.unpack(value)) for group in self.groups)
            raise _KeysAndValues

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            causal = _is_causal(module, options)
            queries = query.permute(2, 1, 0, 3)  # [B, H, 1, d]
            parts = []
            for group, (keys, values) in zip(self.groups, kept, strict=True):
                mask = group.before_read if causal else group.real
                parts.append(sdpa_attention_forward(module, queries[group.rows], keys, values, mask, **options)[0])
            return torch.cat(parts).transpose(0, 1), None

        def read(part: Any) -> Any:
            """Tensors [1, N, …] with one entry per token, cut down to [1, B, …]; everything else as it is."""
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


def _moved(holder: Group | Packing, device: torch.device | str) -> dict[str, Any]:
    """The tensors of a dataclass, on another device."""
    parts = {each.name: getattr(holder, each.name) for each in fields(holder)}
    return {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}


def takes_varying_lengths(states: Tensor) -> bool:
    """Whether the kernel for texts of varying length supports such states: on CUDA, in half precision."""
    return states.is_cuda and states.dtype in (torch.float16, torch.bfloat16)


def _like_lengths(lengths: list[int]) -> Iterator[slice]:
    """Runs of neighbouring texts of like length."""
    start = 0
    shortest = longest = lengths[0]
    for row, length in enumerate(lengths):
        shortest, longest = min(shortest, length), max(longest, length)
        if longest > LENGTH_RATIO * shortest + LENGTH_MARGIN:
            yield slice(start, row)
            start, shortest, longest = row, length, length
    yield slice(start, len(lengths))


class _KeysAndValues(BaseException):
    """A block has computed its keys and values. Not an error."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    packed = _current.get()
    if packed is not None:
        return packed(module, query, key, value, **options)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output


@contextmanager
def _attending(attend: Attention) -> Iterator[None]:
    before = _current.set(attend)
    try:
        yield
    finally:
        _current.reset(before)


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    if options.get("sliding_window") is not None:
        raise TypeError("attention over a window cannot be packed")
    causal = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


# a compiled block leaves its graph for attention, which depends on the texts of each batch
AttentionInterface.register(ATTENTION, torch.compiler.disable(_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
