"""A mirror that is a replica reports the generation that it holds."""

import pytest

from range_store.storage import heartbeat
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import ReplicaRegistry
from range_store.storage.store import RangeStore
from tests.range_store.mirror.controlled import Clock, Mirrors, erasing
from tests.range_store.waiting import until

NAME = "here:1:x"


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that mirrors and their reporters see."""
    monkeypatch.setattr("range_store.storage.heartbeat.time", clock)
    return clock


def reported(store: RangeStore) -> list[tuple[str, str | None]]:
    """Name and generation of every replica in the roster."""
    return [(each.name, each.generation) for each in ReplicaRegistry(store.client, store.model).read().replicas]


def lapse(mirror: Mirror, clock: Clock) -> None:
    """Let so much time pass that others may have given up the replica."""
    clock.advance(heartbeat.SILENT_SECONDS + 1.0)
    assert mirror.lapsed


def test_mirror_without_a_name_reports_nothing(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    mirror = mirrors()
    mirror.start()
    clock.advance(1e6)
    mirror.catch_up()
    mirror.withdraw()
    assert mirror.heartbeat is None
    assert not mirror.lapsed
    assert reported(active) == []


def test_replica_is_known_before_it_has_read_anything(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(replica=NAME)
    mirror.refresh()
    assert reported(active) == [(NAME, None)]


def test_replica_reports_the_generation_that_it_holds(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(replica=NAME)
    assert mirror._held() is None
    state = mirror.refresh().live
    assert mirror._held() == state
    assert mirror.heartbeat is not None
    mirror.heartbeat.report()
    assert reported(active) == [(NAME, state.generation)]


def test_change_wakes_the_reporter(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(replica=NAME)
    assert mirror.heartbeat is not None
    wakes = mirror.heartbeat._wakes
    mirror.refresh()
    assert wakes.qsize() == 1
    mirror.refresh()
    assert wakes.qsize() == 1, "nothing has changed"
    active.set_erasure(erasing("World"))
    mirror.refresh()
    assert wakes.qsize() == 2


def test_start_begins_reporting(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(replica=NAME)
    mirror.start()
    state = active.live_state()
    until(lambda: reported(active) == [(NAME, state.generation)])


def test_catch_up_reports_only_after_a_lapse(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    mirror = mirrors(replica=NAME)
    mirror.refresh()
    state = active.set_erasure(erasing("World"))
    assert mirror.catch_up().live == state
    assert reported(active) == [(NAME, None)], "others have not given it up"
    lapse(mirror, clock)
    later = active.set_erasures([])
    assert mirror.catch_up().live == later
    assert reported(active) == [(NAME, later.generation)]
    assert not mirror.lapsed


def test_lapsed_replica_reads_before_it_reports(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    mirror = mirrors(replica=NAME)
    mirror.refresh()
    lapse(mirror, clock)
    state = active.set_erasure(erasing("World"))
    assert mirror.heartbeat is not None
    mirror.heartbeat.read_and_report()
    assert reported(active) == [(NAME, state.generation)]


def test_withdrawn_replica_leaves_the_roster_and_goes_on_reading(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(replica=NAME)
    mirror.start()
    mirror.withdraw()
    until(lambda: reported(active) == [])
    state = active.set_erasure(erasing("World"))
    assert mirror.refresh().live == state
    assert mirror._thread is not None
    assert mirror._thread.is_alive()


@pytest.mark.parametrize("started", [True, False])
def test_closed_replica_leaves_the_roster(active: RangeStore, mirrors: Mirrors, started: bool) -> None:
    mirror = mirrors(replica=NAME)
    if started:
        mirror.start()
    else:
        mirror.refresh()
    mirror.close()
    assert reported(active) == []
