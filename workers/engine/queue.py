"""What waits, and what runs next: batches by tokens, from a window sorted by length."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from workers.engine.settings import EngineSettings


class Queued(Protocol):
    """One text that waits."""

    @property
    def tokens(self) -> int:
        """Its length in tokens."""
        ...

    @property
    def variants(self) -> int:
        """How often it passes the blocks above the split: twice where its bare answer is wanted beside another."""
        ...

    @property
    def packed(self) -> bool:
        """It meets no padding but in attention."""
        ...

    @property
    def split(self) -> int | None:
        """The block at which its batch is split: a batch holds one split only, so a deep one slows nobody else."""
        ...

    @property
    def plan_key(self) -> str:
        """What masks it; the empty string if nothing does."""
        ...

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the answer any more."""
        ...


Item = TypeVar("Item", bound=Queued)


@dataclass
class BatchQueue(Generic[Item]):
    """Texts in order of arrival. Not thread-safe: the engine holds its lock around every call.

    `tokens` is what waits: tokens × variants of every text.
    """

    settings: EngineSettings
    tokens: int = 0
    _items: OrderedDict[int, Item] = field(default_factory=OrderedDict)
    _next: int = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def add(self, item: Item) -> None:
        """Put a text at the end."""
        self._items[self._next] = item
        self._next += 1
        self.tokens += item.tokens * item.variants

    def discard(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out, and return, every text that is `unwanted`."""
        keys = [key for key, item in self._items.items() if unwanted(item)]
        return [self._pop(key) for key in keys]

    def take(self) -> list[Item]:
        """The next batch: the oldest text and those of its split that are nearest to it in length; [] if none waits.

        The oldest text is always in it, so none starves. Abandoned texts are dropped on the way.
        """
        self.discard(lambda item: item.abandoned)
        if not self._items:
            return []
        oldest = next(iter(self._items))
        window = sorted(self._window(self._items[oldest].split), key=lambda pair: pair[1].tokens)
        at = next(place for place, (key, _) in enumerate(window) if key == oldest)
        return [self._pop(key) for key, _ in self._grow(window, at)]

    def _window(self, split: int | None) -> Iterator[tuple[int, Item]]:
        """The oldest texts of a split, a few batches full: so many that their lengths can be chosen among.

        More would let late texts overtake early ones again and again.
        """
        room = self.settings.window * self.settings.max_batch_tokens
        for key, item in self._items.items():
            if item.split == split:
                yield key, item
                room -= item.tokens * item.variants
                if room <= 0:
                    return

    def _grow(self, window: list[tuple[int, Item]], at: int) -> list[tuple[int, Item]]:
        """The longest run of `window` around place `at` that the limits allow, growing to the nearer length first."""
        start, end = at, at + 1
        first = window[at][1]
        plans = {first.plan_key} - {""}
        tokens, variants = first.tokens * first.variants, first.variants
        while end - start < self.settings.max_batch_texts:
            sides = []
            if start > 0:
                sides.append((first.tokens - window[start - 1][1].tokens, start - 1))
            if end < len(window):
                sides.append((window[end][1].tokens - first.tokens, end))
            for _, place in sorted(sides):
                item = window[place][1]
                more, rows = tokens + item.tokens * item.variants, variants + item.variants
                grown = plans | ({item.plan_key} - {""})
                longest = window[max(end - 1, place)][1].tokens
                counted = more if first.packed else longest * rows
                if counted <= self.settings.max_batch_tokens and len(grown) <= self.settings.max_batch_plans:
                    start, end, plans, tokens, variants = min(start, place), max(end, place + 1), grown, more, rows
                    break
            else:
                break
        return window[start:end]

    def _pop(self, key: int) -> Item:
        item = self._items.pop(key)
        self.tokens -= item.tokens * item.variants
        return item
