"""The queue of texts: batches by tokens, from a window sorted by length."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from workers.engine.settings import EngineSettings


class Queued(Protocol):
    """One text that waits.

    Attributes:
        tokens: its length. variants: how often it runs through the blocks above the split.
        packed: it needs no padding outside attention.
        split: the block at which its batch is split. A batch has one split, so a low one slows nobody else.
        plan_key: of its plan; empty if nothing is erased.
        abandoned: nobody waits for the answer any more.
    """

    @property
    def tokens(self) -> int: ...

    @property
    def variants(self) -> int: ...

    @property
    def packed(self) -> bool: ...

    @property
    def split(self) -> int | None: ...

    @property
    def plan_key(self) -> str: ...

    @property
    def abandoned(self) -> bool: ...


Item = TypeVar("Item", bound=Queued)


@dataclass
class BatchQueue(Generic[Item]):
    """Texts in order of arrival. Not thread-safe: the scheduler holds its lock around every call.

    Attributes:
        tokens: the sum of tokens × variants of every text.
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
        """Add a text at the end."""
        self._items[self._next] = item
        self._next += 1
        self.tokens += item.tokens * item.variants

    def discard(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Remove and return every text that is `unwanted`."""
        keys = [key for key, item in self._items.items() if unwanted(item)]
        return [self._pop(key) for key in keys]

    def take(self) -> list[Item]:
        """Remove the next batch: the oldest text and those of its split that are nearest to it in length.

        The oldest text is always in it, so none starves. Abandoned texts are dropped. Empty if no text waits.
        """
        self.discard(lambda item: item.abandoned)
        if not self._items:
            return []
        oldest = next(iter(self._items))
        window = sorted(self._window(self._items[oldest].split), key=lambda pair: pair[1].tokens)
        at = next(place for place, (key, _) in enumerate(window) if key == oldest)
        return [self._pop(key) for key, _ in self._grow(window, at)]

    def _window(self, split: int | None) -> Iterator[tuple[int, Item]]:
        """The oldest texts of a split, enough for a few batches, to choose similar lengths from.

        With more, late texts would overtake early ones again and again.
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
