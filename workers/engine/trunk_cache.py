"""Trunk states of texts that may come again: a text that is tried under many settings runs its trunk once.

A state depends on the model and its type as well as on text and split; a cache belongs to one loaded model.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.models.steerable import SteerableModel, Trunk
from workers.models.tokens import Encoded, TextTokenizer, TokenBatch

TOKEN_BYTES = 28
"""Estimated size of a token id in a key, so that keys count too: a Python number, in a tuple."""


@dataclass(frozen=True, eq=False)
class _State:
    """One text: hidden [t, D], or [1, D] after the last block; logits [K] of the bare model, if they were needed."""

    hidden: Tensor
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + (0 if self.logits is None else self.logits.nbytes)


class TrunkCache:
    """Evicts the least recently used first. Not thread-safe: it belongs to the model's thread.

    Args:
        model: one that `keeps_trunks`.
        capacity: most bytes of states, and of their keys by estimate.
    """

    def __init__(self, model: SteerableModel, tokens: TextTokenizer, capacity: int) -> None:
        self._model, self._tokens, self._capacity = model, tokens, capacity
        self._states: OrderedDict[tuple[int, Encoded], _State] = OrderedDict()
        self.nbytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._states)

    def trunk(self, batch: TokenBatch, texts: Sequence[Encoded], split: int, *, whole: bool) -> Trunk:
        """The trunk of a batch. Only the texts that are not cached are run, and cached from now on.

        Args:
            texts: those of the batch.
            whole: the bare model's logits are needed too.
        """
        states = {text: self._cached(split, text, whole) for text in texts}
        unknown = [text for text, state in states.items() if state is None]
        self.misses += len(unknown)
        self.hits += len(texts) - len(unknown)
        if unknown:
            run = batch if len(unknown) == len(texts) else self._tokens.batch(unknown, batch.ids.device)
            trunk = self._model.trunk(run, split, whole=whole)
            assert trunk.hidden is not None
            for row, text in enumerate(unknown):
                hidden = trunk.hidden[row, : len(text.ids)].clone()  # after the last block it has one row
                state = _State(hidden, None if trunk.logits is None else trunk.logits[row].clone())
                states[text] = state
                self._add(split, text, state)
            if run is batch:
                return trunk
        return _join([known for text in texts if (known := states[text]) is not None], split, whole)

    def _cached(self, split: int, text: Encoded, whole: bool) -> _State | None:
        state = self._states.get((split, text))
        if state is None or (whole and state.logits is None):
            return None
        self._states.move_to_end((split, text))
        return state

    def _add(self, split: int, text: Encoded, state: _State) -> None:
        self._drop((split, text))
        self._states[split, text] = state
        self.nbytes += state.nbytes + _key_bytes(text)
        while self.nbytes > self._capacity:
            self._drop(next(iter(self._states)))

    def _drop(self, key: tuple[int, Encoded]) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.nbytes -= state.nbytes + _key_bytes(key[1])


def _join(states: Sequence[_State], split: int, whole: bool) -> Trunk:
    """A right-padded trunk of single texts."""
    hidden = torch.nn.utils.rnn.pad_sequence([state.hidden for state in states], batch_first=True)
    logits = torch.stack([state.logits for state in states if state.logits is not None]) if whole else None
    return Trunk(split, hidden, logits)


def _key_bytes(text: Encoded) -> int:
    return TOKEN_BYTES * (len(text.ids) + len(text.type_ids or ()))
