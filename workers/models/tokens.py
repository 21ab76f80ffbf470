"""Texts to token ids, and token ids to right-padded batches that know their read positions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from workers.models.errors import EmptyText, PairUnsupported, TextTooLong, UnknownToken
from workers.models.packing import Packing
from workers.models.texts import TextOrPair, TokenInfo, TokenizedText


@dataclass(frozen=True)
class Encoded:
    """One text, or a pair, as token ids, special tokens included; `truncated` if it was cut to fit the model.

    type_ids: for a pair, 0 for tokens of the first text and 1 for those of the second, if the model has such ids.
    """

    ids: tuple[int, ...]
    truncated: bool = False
    type_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Right-padded texts.

    Attributes:
        ids: [B, T] int64. mask: [B, T] bool, True on real tokens. read: read positions, [B] int64.
        also_read: [B, T] bool, positions that the head reads beside `read` (few-shot: tokens of the label strings).
        packing: the same texts end to end, for models that can take them so.
        type_ids: [B, T] int64, token type ids, 0 on padding; None: all 0, or the model has none.
    """

    ids: Tensor
    mask: Tensor
    read: Tensor
    also_read: Tensor | None = None
    packing: Packing | None = None
    type_ids: Tensor | None = None

    @classmethod
    def full(cls, ids: Tensor) -> "TokenBatch":
        """A batch without padding, read at the first token."""
        return cls(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids[:, 0]))

    @property
    def is_read(self) -> Tensor:
        """True at every position that the head reads, [B, T] bool."""
        at_read = torch.arange(self.ids.shape[1], device=self.ids.device) == self.read.unsqueeze(1)
        return at_read if self.also_read is None else at_read | self.also_read

    def rows(self, index: Tensor) -> "TokenBatch":
        """The batch of these rows, which may repeat. index: [V] int64."""
        also_read = None if self.also_read is None else self.also_read[index]
        type_ids = None if self.type_ids is None else self.type_ids[index]
        return TokenBatch(self.ids[index], self.mask[index], self.read[index], also_read, type_ids=type_ids)

    def read_tokens(self) -> "TokenBatch":
        """The batch cut down to the one token at the read position, of shape [B, 1]."""
        at = self.read.unsqueeze(1)
        type_ids = None if self.type_ids is None else self.type_ids.gather(1, at)
        return replace(TokenBatch.full(self.ids.gather(1, at)), type_ids=type_ids)


class TextTokenizer:
    """A Hugging Face tokenizer with the rules of this service: no silent truncation, right padding.

    Args:
        tokenizer: the checkpoint's tokenizer.
        max_tokens: most tokens that the model takes, special tokens included.
        pad_id: the token id that the *model* takes for padding (its head looks for it).
        reads: "first" or "last" real token.
        suffix: token ids that close every text (`<sep>`, or the end of a prompt). Then the tokenizer adds no special
            tokens of its own, truncation cuts the text and never the suffix, and the last token is read.
        typed: the model takes token type ids, which say which text of a pair a token is of.
        n_embeddings: tokens that the model has an embedding for; None: all that the tokenizer can give.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        pad_id: int,
        reads: Literal["first", "last"],
        suffix: tuple[int, ...] = (),
        typed: bool = False,
        n_embeddings: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._reads = reads
        self._typed = typed
        self._n_embeddings = n_embeddings
        self.suffix = suffix
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    @property
    def truncation_side(self) -> Literal["left", "right"]:
        """Where a text that is too long is cut, as the tokenizer's configuration says."""
        return "left" if self._tokenizer.truncation_side == "left" else "right"

    def encode(self, texts: Sequence[TextOrPair], truncate: bool = True, *, keep_empty: bool = False) -> list[Encoded]:
        """Token ids of each text or pair, as the tokenizer itself joins and cuts (the longer text first) a pair.

        Args:
            keep_empty: give a text without any token, or with one that the model has no embedding for, no ids, instead
                of raising an error.

        Raises:
            TextTooLong: a text needs more than `max_tokens` tokens and `truncate` is False.
            EmptyText: a text gives no token at all.
            UnknownToken: a text holds a token that the model has no embedding for.
            PairUnsupported: a pair, where a suffix closes each text.
        """
        if not texts:
            return []
        if self.suffix:
            return self._only_embedded(self._encode_with_suffix(texts, truncate), keep_empty)
        encoded = self._encoded(texts, truncation=False)
        for index, text in enumerate(encoded):
            if not text.ids and not keep_empty:
                raise EmptyText(index)
        long = [index for index, text in enumerate(encoded) if len(text.ids) > self.max_tokens]
        if long and not truncate:
            raise TextTooLong(long[0], len(encoded[long[0]].ids), self.max_tokens)
        if long:  # the tokenizer itself must cut, since it knows which special tokens close a text
            cut = self._encoded([texts[index] for index in long], truncation=True)
            for index, text in zip(long, cut, strict=True):
                encoded[index] = replace(text, truncated=True)
        return self._only_embedded(encoded, keep_empty)

    def _only_embedded(self, encoded: list[Encoded], keep_empty: bool) -> list[Encoded]:
        """Empty each text with a token that the model has no embedding for, or raise UnknownToken."""
        if self._n_embeddings is None:
            return encoded
        for index, text in enumerate(encoded):
            unknown = next((id_ for id_ in text.ids if id_ >= self._n_embeddings), None)
            if unknown is not None and not keep_empty:
                token = self._tokenizer.convert_ids_to_tokens(unknown)
                raise UnknownToken(index, token, unknown, self._n_embeddings)
            if unknown is not None:
                encoded[index] = Encoded(())
        return encoded

    def _encode_with_suffix(self, texts: Sequence[TextOrPair], truncate: bool) -> list[Encoded]:
        room = self.max_tokens - len(self.suffix)
        encoded = []
        single = [text for text in texts if isinstance(text, str)]
        if len(single) < len(texts):
            raise PairUnsupported(next(index for index, text in enumerate(texts) if not isinstance(text, str)))
        for index, ids in enumerate(self._tokenized(single, truncation=False)["input_ids"]):
            if len(ids) > room and not truncate:
                raise TextTooLong(index, len(ids) + len(self.suffix), self.max_tokens)
            kept = ids[-room:] if self.truncation_side == "left" else ids[:room]
            encoded.append(Encoded((*kept, *self.suffix), truncated=len(ids) > room))
        return encoded

    def _encoded(self, texts: Sequence[TextOrPair], truncation: bool) -> list[Encoded]:
        single = [text for text in texts if isinstance(text, str)]
        alone = iter(self._tokenized(single, truncation)["input_ids"] if single else ())
        if len(single) == len(texts):
            return [Encoded(tuple(ids)) for ids in alone]
        pairs = [text for text in texts if not isinstance(text, str)]
        joined = self._tokenized([pair[0] for pair in pairs], truncation, [pair[1] for pair in pairs])
        types = map(tuple, joined["token_type_ids"]) if self._typed else repeat(None)
        paired = zip(joined["input_ids"], types, strict=False)
        encoded = []
        for text in texts:
            ids, type_ids = (next(alone), None) if isinstance(text, str) else next(paired)
            encoded.append(Encoded(tuple(ids), type_ids=type_ids))
        return encoded

    def _tokenized(
        self, texts: Sequence[str], truncation: bool, seconds: Sequence[str] | None = None, **more: bool
    ) -> Any:
        """The tokenizer's own output. seconds: the second text of each pair."""
        return self._tokenizer(
            _without_surrogates(texts),
            None if seconds is None else _without_surrogates(seconds),
            padding=False,
            add_special_tokens=not self.suffix,
            truncation=truncation,
            max_length=self.max_tokens if truncation else None,
            return_attention_mask=False,
            return_token_type_ids=seconds is not None and self._typed,
            verbose=False,
            **more,
        )

    def describe(self, texts: Sequence[str]) -> list[TokenizedText]:
        """The tokens of each text, as `encode` gives them with `truncate`; a text may have none."""
        encoded = self.encode(texts, keep_empty=True)
        return [self._described(text, each) for text, each in zip(texts, encoded, strict=True)]

    def _described(self, text: str, encoded: Encoded) -> TokenizedText:
        total = len(self._tokenized([text], False)["input_ids"][0]) + len(self.suffix)
        spans: list[tuple[int, int] | None] = [None] * len(encoded.ids)
        own = len(encoded.ids) - len(self.suffix)
        if self._tokenizer.is_fast:
            details = self._tokenized(
                [text],
                encoded.truncated and not self.suffix,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
            kept = slice(-own, None) if own and self.truncation_side == "left" else slice(own)
            special = [bool(each) for each in details["special_tokens_mask"][0][kept]]
            offsets = details["offset_mapping"][0][kept]
            spans[:own] = [None if added else span for span, added in zip(offsets, special, strict=True)]
        else:
            special_ids = set(self._tokenizer.all_special_ids)
            special = [each in special_ids for each in encoded.ids[:own]]
        special += [True] * len(self.suffix)
        read = int(self.batch([encoded]).read[0]) if encoded.ids else -1
        names: list[str] = self._tokenizer.convert_ids_to_tokens(list(encoded.ids))
        tokens = tuple(
            TokenInfo(id_, name, span and span[0], span and span[1], added, place == read)
            for place, (id_, name, span, added) in enumerate(zip(encoded.ids, names, spans, special, strict=True))
        )
        return TokenizedText(tokens, total, encoded.truncated)

    def batches(
        self, texts: Sequence[Encoded], batch_tokens: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[list[int], TokenBatch]]:
        """Batches of texts of like length, with their places in `texts`; texts without a token are left out.

        Args:
            batch_tokens: see `length_sorted`.
        """
        places = [place for place, text in enumerate(texts) if text.ids]
        for group in length_sorted([len(texts[place].ids) for place in places], batch_tokens):
            rows = [places[index] for index in group]
            yield rows, self.batch([texts[row] for row in rows], device)

    def batch(self, texts: Sequence[Encoded], device: torch.device | str = "cpu") -> TokenBatch:
        """Texts and pairs as one right-padded batch on `device`; with token type ids if any of them has some."""
        lengths = torch.tensor([len(text.ids) for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        ids = _padded([text.ids for text in texts], mask, self.pad_id)
        type_ids = None
        if any(text.type_ids is not None for text in texts):
            type_ids = _padded([text.type_ids or (0,) * len(text.ids) for text in texts], mask, 0)
        read = self._read_positions(ids, mask)
        packing = Packing.of(ids, mask, read, type_ids).to(device)
        type_ids = None if type_ids is None else type_ids.to(device)
        return TokenBatch(ids.to(device), mask.to(device), read.to(device), packing=packing, type_ids=type_ids)

    def _read_positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Where the head reads: token 0, or the last real token, [B].

        Decoder heads of transformers take the last token *that is not the pad id*. Where pad and eos are one id and
        a text ends in it, that is an earlier token; fitting and erasing must act on the token that is read.
        """
        if self._reads == "first":
            return torch.zeros(len(ids), dtype=torch.int64)
        if self.suffix:
            return mask.sum(dim=1) - 1
        readable = mask & (ids != self.pad_id)
        return (torch.arange(ids.shape[1]) * readable).argmax(dim=1)


def _without_surrogates(texts: Sequence[str]) -> list[str]:
    """A lone surrogate is legal in JSON, but no tokenizer takes it."""
    return [text.encode("utf-8", "replace").decode("utf-8") for text in texts]


def _padded(rows: Sequence[Sequence[int]], mask: Tensor, padding: int) -> Tensor:
    """Rows of numbers as [B, T] int64: where `mask` is True, and `padding` elsewhere."""
    numbers = torch.full(mask.shape, padding, dtype=torch.int64)
    numbers[mask] = torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64, int(mask.sum())))
    return numbers


def length_sorted(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows grouped into batches of like length, shortest first; the order depends on the lengths alone.

    Args:
        lengths: tokens of each row.
        batch_tokens: most padded tokens of a batch (rows × longest); a longer row is a batch of its own.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):  # stable: ties keep their order
        if batch and lengths[row] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
