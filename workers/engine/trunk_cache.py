"""Trunk states of texts that may come again: whoever tries τ and percentages on one text pays its tails only.

A state depends on the model and its type as well as on text and split; a cache belongs to one loaded model.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.models.steered import SteeredModel, Trunk
from workers.models.tokens import Encoded, TextTokenizer, TokenBatch

TEXT_BYTES = 28
"""Of a token, its id a Python number in a tuple's slot it shares: an estimate, so that the keys count too."""


@dataclass(frozen=True, eq=False)
class _State:
    """Of one text: hidden [t, D], or [1, D] after the last block; logits [K] of the bare model, if they were needed."""

    hidden: Tensor
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + (0 if self.logits is None else self.logits.nbytes)


class TrunkCache:
    """Least recently used first out. Not thread-safe: the engine's thread alone uses it.

    Args:
        limit: most bytes of states, and of their keys by estimate.
    """

    def __init__(self, model: SteeredModel, tokens: TextTokenizer, limit: int) -> None:
        self._model, self._tokens, self._limit = model, tokens, limit
        self._states: OrderedDict[tuple[int, Encoded], _State] = OrderedDict()
        self.nbytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._states)

    def trunk(self, batch: TokenBatch, texts: Sequence[Encoded], split: int, *, whole: bool) -> Trunk:
        """The trunk of a batch, of which only the texts that are not kept are run, and kept from now on.

        Args:
            texts: those of the batch.
            whole: the bare model's logits are needed too.
        """
        states = {text: self._kept(split, text, whole) for text in texts}
        unknown = [text for text, state in states.items() if state is None]
        self.misses += len(unknown)
        self.hits += len(texts) - len(unknown)
        if unknown:
            run = batch if len(unknown) == len(texts) else self._tokens.batch(unknown, batch.ids.device)
            trunk = self._model.trunk(run, split, whole=whole)
            for row, text in enumerate(unknown):
                hidden = trunk.hidden[row, : len(text.ids)].clone()  # after the last block it has one row
                state = _State(hidden, None if trunk.logits is None else trunk.logits[row].clone())
                states[text] = state
                self._keep(split, text, state)
            if run is batch:
                return trunk
        return self._together([states[text] for text in texts], batch, split, whole)

    def _together(self, states: Sequence[_State | None], batch: TokenBatch, split: int, whole: bool) -> Trunk:
        found = [state for state in states if state is not None]
        width = max(len(state.hidden) for state in found)
        hidden = found[0].hidden.new_zeros((len(found), width, found[0].hidden.shape[1]))
        for row, state in enumerate(found):
            hidden[row, : len(state.hidden)] = state.hidden
        logits = torch.stack([state.logits for state in found if state.logits is not None]) if whole else None
        return Trunk(split, hidden, logits)

    def _kept(self, split: int, text: Encoded, whole: bool) -> _State | None:
        state = self._states.get((split, text))
        if state is None or (whole and state.logits is None):
            return None
        self._states.move_to_end((split, text))
        return state

    def _keep(self, split: int, text: Encoded, state: _State) -> None:
        self._drop((split, text))
        self._states[split, text] = state
        self.nbytes += state.nbytes + _key_bytes(text)
        while self.nbytes > self._limit:
            self._drop(next(iter(self._states)))

    def _drop(self, key: tuple[int, Encoded]) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.nbytes -= state.nbytes + _key_bytes(key[1])


def _key_bytes(text: Encoded) -> int:
    return TEXT_BYTES * (len(text.ids) + len(text.type_ids or ()))
