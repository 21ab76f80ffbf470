"""A mirror follows the store: by its own reads, by messages and by polls; and tells its listener of each change."""

import threading

import pytest
import redis

from range_store.domain.live import LiveState
from range_store.domain.range_set import Provenance
from range_store.errors import StoreUnavailable, UnknownRangeSet
from range_store.storage.mirror import ATTEMPTS, Mirror, Snapshot
from range_store.storage.schema import CHANGES
from range_store.storage.store import RangeStore
from tests.range_store.builders import random_range_set
from tests.range_store.mirror.controlled import NEVER, Clock, Mirrors, erasing
from tests.range_store.waiting import until


def subscribed(mirror: Mirror, client: redis.Redis) -> None:
    """Return when the mirror receives messages."""
    until(lambda: dict(client.pubsub_numsub(CHANGES)).get(CHANGES.encode(), 0))
    until(lambda: mirror.snapshot)


def test_empty_store_gives_a_snapshot_without_a_range_set(store: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    assert mirror.snapshot is None
    mirror.start()
    assert mirror.snapshot is not None
    assert (mirror.snapshot.live, mirror.snapshot.range_set) == (store.live_state(), None)
    assert (mirror.store_up, mirror.problem) == (True, None)


def test_refresh_sees_a_change_of_this_process(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=NEVER)
    for concept in ("World", "Sports"):
        state = active.set_erasure(erasing(concept))
        mirror.refresh()
        assert mirror.snapshot is not None
        assert mirror.snapshot.live == state
    assert mirror.snapshot.range_set is not None
    assert mirror.snapshot.range_set.id == state.range_set


def test_message_alone_updates_the_snapshot(active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    subscribed(mirror, redis_client)
    for concept in ("World", "Sports"):
        state = active.set_erasure(erasing(concept))
        until(lambda state=state: mirror.snapshot.live == state)


def test_poll_finds_a_change_without_a_message(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=0.05)
    mirror.start()
    assert mirror.snapshot is not None
    unannounced = mirror.snapshot.live.next_generation(mirror.snapshot.live.range_set, (erasing("World"),))
    active.client.set(active.keys.live, unannounced.model_dump_json())
    until(lambda: mirror.snapshot.live == unannounced)


def test_foreign_and_malformed_messages_are_harmless(
    active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors
) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    subscribed(mirror, redis_client)
    for message in (b"\xff", b"[]", b"", b"{", b'{"model": "another"}', b'{"model": 1}'):
        redis_client.publish(CHANGES, message)
    state = active.set_erasure(erasing("World"))
    until(lambda: mirror.snapshot.live == state)


def test_mirror_reconnects_and_reads_what_it_missed(
    active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors
) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    subscribed(mirror, redis_client)
    for concept in ("World", "Sports"):
        redis_client.client_kill_filter(_type="pubsub")
        state = active.set_erasure(erasing(concept))
        until(lambda state=state: mirror.snapshot.live == state)


def test_range_set_is_loaded_only_when_another_becomes_active(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh().range_set
    active.set_erasure(erasing("World"))
    assert mirror.refresh().range_set is held
    second = active.range_sets.publish(*random_range_set(605))
    active.activate(second)
    found = mirror.refresh().range_set
    assert found is not None
    assert found.id == second


def test_concurrent_refreshes_are_serialized(active: RangeStore, mirrors: Mirrors) -> None:
    """A slow read never overwrites a newer one: the next read begins after it has ended."""
    mirror = mirrors()
    mirror.refresh()
    peek, lock = active.read_live_state, mirror._reading
    waiting, inside, proceed = threading.Event(), threading.Event(), threading.Event()
    reading: list[str] = []

    class Watched:
        """The mirror's lock; tells when the second thread is about to take it."""

        def __enter__(self) -> None:
            if threading.current_thread() is fast:
                waiting.set()
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    def slow_peek() -> LiveState | None:
        found = peek()
        reading.append(threading.current_thread().name)
        if threading.current_thread() is slow:
            inside.set()
            assert proceed.wait(20)
        return found

    active.read_live_state = slow_peek  # type: ignore[method-assign]
    mirror._reading = Watched()  # type: ignore[assignment]
    slow = threading.Thread(target=mirror.refresh, name="slow")
    fast = threading.Thread(target=mirror.refresh, name="fast")
    slow.start()
    assert inside.wait(20)
    state = active.set_erasure(erasing("World"))
    fast.start()
    assert waiting.wait(20)
    assert reading == ["slow"]
    proceed.set()
    slow.join()
    fast.join()
    assert reading == ["slow", "fast"]
    assert mirror.snapshot is not None
    assert mirror.snapshot.live == state


def test_listener_is_told_of_every_change_once_and_in_order(
    active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors
) -> None:
    told: list[str] = []

    def listen(snapshot: Snapshot) -> None:
        told.append(snapshot.live.generation)
        raise RuntimeError("a listener that fails must not stop the mirror")

    mirror = mirrors(poll=0.02, on_change=listen)
    mirror.start()
    expected = [active.live_state().generation]
    for concept in ("World", "Sports", "Business"):
        expected.append(active.set_erasure(erasing(concept)).generation)
        until(lambda: told == expected)


def test_listener_is_not_told_of_an_unchanged_state(active: RangeStore, mirrors: Mirrors) -> None:
    seen: list[Snapshot] = []
    mirror = mirrors(on_change=seen.append)
    first = mirror.refresh()
    assert mirror.refresh().live == first.live
    assert seen == [first]
    active.set_erasure(erasing("World"))
    second = mirror.refresh()
    assert seen == [first, second]


def test_refresh_keeps_the_range_set_and_dates_the_snapshot(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    mirror = mirrors()
    first = mirror.refresh()
    assert mirror.snapshot is first
    clock.advance(5.0)
    state = active.set_erasure(erasing("World"))
    second = mirror.refresh()
    assert second.range_set is first.range_set is not None
    assert (first.read_at, second.read_at, second.live) == (0.0, 5.0, state)


def test_companion_is_called_at_every_read_even_a_failing_one(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    mirror = mirrors(on_read=lambda: calls.append(None))
    mirror.refresh()
    assert len(calls) == 1

    def peek() -> LiveState | None:
        raise StoreUnavailable("down")

    monkeypatch.setattr(active, "read_live_state", peek)
    with pytest.raises(StoreUnavailable, match="down"):
        mirror.refresh()
    assert len(calls) == 2


def test_range_set_that_is_replaced_and_removed_during_a_read_is_read_anew(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = active.live_state().range_set, active.range_sets.publish(*random_range_set(605))
    provenance = active.range_sets.provenance
    asked: list[str] = []

    def replaced(id_: str) -> Provenance:
        asked.append(id_)
        if len(asked) == 1:
            active.activate(second)
            active.range_sets.remove(id_)
        return provenance(id_)

    monkeypatch.setattr(active.range_sets, "provenance", replaced)
    found = mirrors().refresh()
    assert asked == [first, second]
    assert found.range_set is not None
    assert (found.range_set.id, found.live.range_set) == (second, second)


def test_missing_range_set_is_an_error_after_a_few_attempts(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def missing(id_: str) -> Provenance:
        calls.append(id_)
        raise UnknownRangeSet(id_)

    monkeypatch.setattr(active.range_sets, "provenance", missing)
    with pytest.raises(UnknownRangeSet):
        mirrors().refresh()
    assert len(calls) == ATTEMPTS == 3


def test_mirror_reads_in_one_daemon_thread(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    mirror.start()
    thread = mirror._thread
    assert thread is not None
    assert (thread.name, thread.daemon, thread.is_alive()) == ("neuronlens-mirror", True, True)
    mirror.start()
    assert mirror._thread is thread


def test_close_ends_the_thread_and_keeps_the_snapshot(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    mirror.start()
    held = mirror.snapshot
    mirror.close()
    assert mirror._thread is not None
    assert not mirror._thread.is_alive()
    assert mirror.snapshot is not None
    assert mirror.snapshot.live == held.live  # type: ignore[union-attr]


def test_close_without_start_is_harmless(mirrors: Mirrors) -> None:
    mirrors().close()
