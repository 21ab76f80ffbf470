"""Mirrors of a model of the test's own, and a clock that the test controls."""

from collections.abc import Iterator

import pytest

from range_store.storage.clock import StoreClock
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.range_store.builders import FINGERPRINT, random_range_set
from tests.range_store.mirror.controlled import Clock, Mirrors


@pytest.fixture
def active(store: RangeStore) -> RangeStore:
    """A store whose range set is active."""
    store.activate(store.range_sets.publish(*random_range_set(600)))
    return store


@pytest.fixture
def mirrors(store: RangeStore) -> Iterator[Mirrors]:
    """`mirrors(**options)`: a mirror of the store, closed after the test."""
    made: list[Mirror] = []

    def make(store: RangeStore = store, **options: object) -> Mirror:
        made.append(Mirror(store, FINGERPRINT, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for mirror in made:
        mirror.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that mirrors see, by Redis's clock too."""
    clock = Clock()
    monkeypatch.setattr("range_store.storage.mirror.time", clock)
    monkeypatch.setattr(StoreClock, "now", lambda self: clock.time())
    return clock
