"""A clock that tests move, and a mirror's loops run step by step against a real subscription."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.mirror import Mirror, Snapshot
from range_store.storage.store import RangeStore

NEVER = 3600.0
"""As `poll`: the timer does not read during a test."""
WALL = float(2**32)
"""Unix time at which a controlled clock begins: after any real time, so that only the clock makes erasures expire."""
LOGGERS = {"range_store.storage.mirror", "range_store.storage.recovery"}
Mirrors = Callable[..., Mirror]
Step = Callable[[], object] | None


def erasing(concept: str, expires_at: float | None = None) -> LiveErasure:
    return LiveErasure(erasure=Erasure(concept=concept), expires_at=expires_at)


def concepts(snapshot: Snapshot | None) -> list[str]:
    return [each.concept for each in snapshot.live.erasures] if snapshot else []


def empty(store: RangeStore) -> None:
    """Delete everything of the store's model, as if Redis had been emptied."""
    for published in store.range_sets.list():
        store.client.delete(*store.client.keys(f"neuronlens:rangeset:{published.id}:*"))
    store.client.delete(store.keys.live, store.keys.audit, store.keys.range_sets)


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and message of every record of the mirror and its recovery."""
    return [(each.levelname, each.getMessage()) for each in caplog.records if each.name in LOGGERS]


def fields(caplog: pytest.LogCaptureFixture) -> list[tuple[object, object]]:
    """Model and generation of every record of the mirror."""
    return [
        (getattr(each, "model", None), getattr(each, "generation", None))
        for each in caplog.records
        if each.name in LOGGERS
    ]


class Clock:
    """Stands in for the module `time`; begins at 0 on the monotonic clock and moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return WALL + self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Feed:
    """A real subscription whose waiting moves the clock instead.

    Each wait takes one step: None passes the time that the mirror would wait; a function is called, and the message
    that it makes Redis send is returned. After the last step the mirror is told to stop.
    """

    def __init__(self, feed: Any, clock: Clock, mirror: Mirror, steps: Iterable[Step]) -> None:
        self._feed, self._clock, self._mirror = feed, clock, mirror
        self._steps = iter(steps)
        self._delivered = False
        self.waits: list[float] = []
        """Seconds that the mirror was ready to wait for each message."""
        self.drains: list[float] = []
        """Likewise, where it asked for further messages after one had come."""
        self.closed = False

    def __enter__(self) -> "Feed":
        self._feed.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True
        self._feed.__exit__(*error)

    def subscribe(self, channel: str) -> None:
        self._feed.subscribe(channel)

    def get_message(self, timeout: float) -> dict[str, Any] | None:
        if self._delivered:
            self._delivered = False
            self.drains.append(timeout)
            return None
        self.waits.append(timeout)
        try:
            step = next(self._steps)
        except StopIteration:
            self._mirror._stopping.set()
            return None
        if step is None:
            self._clock.advance(timeout)
            return None
        step()
        message: dict[str, Any] | None = self._feed.get_message(timeout=20.0)
        assert message is not None, "no message came"
        self._delivered = True
        return message


def listen(mirror: Mirror, clock: Clock, steps: Iterable[Step], monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Run the mirror's listening in this thread, on a real subscription, until the steps are used up.

    The first message, which says that the subscription is made, comes before the steps.
    """
    client = mirror._store.client
    feed = Feed(client.pubsub(), clock, mirror, [lambda: None, *steps])
    with monkeypatch.context() as patch:
        patch.setattr(client, "pubsub", lambda: feed)
        mirror._listen()
    return feed


class Stopping(threading.Event):
    """Stands in for the event that ends a mirror's thread: waiting moves the clock, and the last wait sets it."""

    def __init__(self, clock: Clock, waits: int) -> None:
        super().__init__()
        self._clock, self._left = clock, waits
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self._clock.advance(timeout or 0.0)
        self._left -= 1
        if not self._left:
            self.set()
        return self.is_set()
