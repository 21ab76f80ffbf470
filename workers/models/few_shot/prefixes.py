"""Keys and values of a common prompt prefix: one for all plans below the edited block, one per plan above it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.models.sites import ForwardPass
from workers.models.steerable import Edits
from workers.models.tokens import TokenBatch

KeyValues = dict[int, tuple[Tensor, Tensor]]
"""By block: keys and values of the prefix, each [1, heads, P, head size]."""


@dataclass(eq=False)
class PrefixCache:
    """The cache of a forward pass: puts the prefix's keys and values before those of the texts.

    Only `update` is called by a model that is given positions and a whole attention mask.

    Attributes:
        shared: of blocks where all rows have the same. states: of further blocks, one entry per distinct plan.
        rows: the entry of each row, [V] int64; None where there is one entry.
        keep: take keys and values down here instead (the pass over the prefix itself).
    """

    shared: KeyValues = field(default_factory=dict)
    states: Sequence[KeyValues] = ()
    rows: Tensor | None = None
    keep: KeyValues | None = None

    def update(self, key: Tensor, value: Tensor, layer: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keys and values [V, heads, P + T, head size] of block `layer`."""
        if self.keep is not None:
            self.keep[layer] = key, value
            return key, value
        texts = len(key)
        before = [self.shared[layer]] if layer in self.shared else [state[layer] for state in self.states]
        if len(before) == 1:
            front_key, front_value = (part.expand(texts, -1, -1, -1) for part in before[0])
        else:
            assert self.rows is not None
            front_key, front_value = (torch.cat(parts)[self.rows] for parts in zip(*before, strict=True))
        return torch.cat([front_key, key], dim=2), torch.cat([front_value, value], dim=2)

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of the prefix; positions are given, so that nothing depends on it."""
        return 0


class Prefixes:
    """The prefix's keys and values, unedited and per plan.

    Args:
        run: runs the prefix alone, with a cache that takes its keys and values.
        capacity: largest size in bytes of those kept for plans, the least recently used evicted first. Those of one
            plan that are larger are used and not kept.
    """

    def __init__(
        self, run: Callable[[ForwardPass, PrefixCache, torch.device], None], n_layers: int, capacity: int
    ) -> None:
        self._run = run
        self._n_layers = n_layers
        self._capacity = capacity
        self._bare: KeyValues | None = None
        self._hidden: dict[int, Tensor] = {}
        self._plans: OrderedDict[tuple[int, str], KeyValues] = OrderedDict()
        self.nbytes = 0

    def bare(self, device: torch.device) -> PrefixCache:
        """For a pass without edits."""
        return PrefixCache(shared=self._of_bare_model(device))

    def edited(self, split: int, edits: Edits, device: torch.device) -> PrefixCache:
        """For a pass that is edited at block `split` and above: shared up to it, per plan above it.

        Where only read positions are edited, no token of the prefix is, and its states are those of the bare model.
        """
        bare = self._of_bare_model(device)
        if edits.positions == "read" or not self._hidden:
            return PrefixCache(shared=bare)
        keys = edits.keys or [""]
        distinct = list(dict.fromkeys(keys))
        states = [self._of_plan(split, key, edits.row(keys.index(key)), device) for key in distinct]
        rows = torch.tensor([distinct.index(key) for key in keys], device=device) if len(distinct) > 1 else None
        return PrefixCache({layer: bare[layer] for layer in range(split + 1)}, states, rows)

    def _of_bare_model(self, device: torch.device) -> KeyValues:
        """Keys and values at every block; the hidden states are kept too, for plans to start from."""
        if self._bare is None:
            found: KeyValues = {}
            now = ForwardPass(record=range(self._n_layers))
            self._run(now, PrefixCache(keep=found), device)
            self._hidden = dict(now.recorded)
            self._bare = found
        return self._bare

    def _of_plan(self, split: int, key: str, edits: Edits, device: torch.device) -> KeyValues:
        """Keys and values above `split` under one plan. Those of edits without a key are not kept."""
        if key and (split, key) in self._plans:
            self._plans.move_to_end((split, key))
            return self._plans[split, key]
        hidden = self._hidden[split]
        batch = TokenBatch.full(torch.zeros((1, hidden.shape[1]), dtype=torch.int64, device=device))
        if split in edits.layers:
            hidden = edits(split, hidden, batch)
        found: KeyValues = {}
        now = ForwardPass(
            inject=(split, hidden), edit=lambda layer, states: edits(layer, states, batch), edit_layers=edits.layers
        )
        self._run(now, PrefixCache(keep=found), device)
        if key:
            self._keep((split, key), found)
        return found

    def _keep(self, name: tuple[int, str], states: KeyValues) -> None:
        size = _bytes(states)
        if size > self._capacity:
            return
        self._plans[name] = states
        self.nbytes += size
        while self.nbytes > self._capacity:
            self.nbytes -= _bytes(self._plans.popitem(last=False)[1])


def _bytes(states: KeyValues) -> int:
    return sum(part.nbytes for pair in states.values() for part in pair)
