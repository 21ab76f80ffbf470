"""What a worker holds: it converges whatever is lost, and never drops what it knows (DESIGN promise 5)."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from range_store.embedded import connect
from range_store.embedded_server import EmbeddedServer
from range_store.erasure import Erasure
from range_store.errors import ForeignRangeSet, InvalidRangeSet, StoreUnavailable, UnknownRangeSet
from range_store.keys import CHANGES, part_key
from range_store.live import LiveErasure, LiveState
from range_store.mirror import Mirror, Snapshot
from range_store.store import RangeStore
from tests.range_store.builders import FINGERPRINT, random_range_set
from tests.range_store.waiting import until

NEVER = 3600.0
"""As `poll`: what is seen then was not seen by the timer."""
Mirrors = Callable[..., Mirror]


def erasing(concept: str, expires_at: float | None = None) -> LiveErasure:
    return LiveErasure(erasure=Erasure(concept=concept), expires_at=expires_at)


def concepts(snapshot: Snapshot | None) -> list[str]:
    return [each.concept for each in snapshot.live.erasures] if snapshot else []


@pytest.fixture
def mirrors(store: RangeStore) -> Iterator[Mirrors]:
    made: list[Mirror] = []

    def make(store: RangeStore = store, **options: object) -> Mirror:
        made.append(Mirror(store, FINGERPRINT, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for mirror in made:
        mirror.close()


@pytest.fixture
def active(store: RangeStore) -> RangeStore:
    store.activate(store.publish(*random_range_set(600)))
    return store


def subscribed(mirror: Mirror, client: redis.Redis) -> None:
    """Return when the mirror hears messages."""
    until(lambda: dict(client.pubsub_numsub(CHANGES)).get(CHANGES.encode(), 0))
    until(lambda: mirror.snapshot)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of this test's own, to kill."""
    server = EmbeddedServer(tmp_path / "redis")
    with server.locked():
        server.ensure()
    yield server
    with server.locked():
        if server.running():
            server.end()


def kill(server: EmbeddedServer) -> None:
    os.kill(int((server.directory / "redis.pid").read_text()), signal.SIGKILL)
    until(lambda: not server.running())


def restart(server: EmbeddedServer) -> None:
    with server.locked():
        server.ensure()


def test_an_empty_store_is_a_snapshot_without_a_range_set(store: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    assert mirror.snapshot is None
    mirror.start()
    assert mirror.snapshot is not None
    assert (mirror.snapshot.live, mirror.snapshot.range_set) == (store.live(), None)
    assert (mirror.store_up, mirror.problem) == (True, None)


def test_a_change_in_this_process_is_seen_by_the_next_reader(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=NEVER)
    for concept in ("World", "Sports"):
        state = active.set_erasure(erasing(concept))
        mirror.refresh()
        assert mirror.snapshot is not None
        assert mirror.snapshot.live == state
    assert mirror.snapshot.range_set is not None
    assert mirror.snapshot.range_set.id == state.range_set


def test_a_message_is_enough(active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    subscribed(mirror, redis_client)
    for concept in ("World", "Sports"):
        state = active.set_erasure(erasing(concept))
        until(lambda state=state: mirror.snapshot.live == state)


def test_a_lost_message_costs_one_poll(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=0.05)
    mirror.start()
    assert mirror.snapshot is not None
    unannounced = mirror.snapshot.live.advanced(mirror.snapshot.live.range_set, (erasing("World"),))
    active.client.set(active.keys.live, unannounced.model_dump_json())
    until(lambda: mirror.snapshot.live == unannounced)


def test_a_message_of_another_model_or_of_nobody_does_no_harm(
    active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors
) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    subscribed(mirror, redis_client)
    for message in (b"\xff", b"[]", b"", b"{", b'{"model": "another"}', b'{"model": 1}'):
        redis_client.publish(CHANGES, message)
    state = active.set_erasure(erasing("World"))
    until(lambda: mirror.snapshot.live == state)


def test_a_cut_connection_is_made_again_and_what_was_missed_is_read(
    active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors
) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    subscribed(mirror, redis_client)
    for concept in ("World", "Sports"):
        redis_client.client_kill_filter(_type="pubsub")
        state = active.set_erasure(erasing(concept))
        until(lambda state=state: mirror.snapshot.live == state)


def test_redis_gone_and_back(server: EmbeddedServer, mirrors: Mirrors) -> None:
    """The last good snapshot stays and says how old it is; then the worker converges."""
    store = RangeStore(connect(f"unix://{server.socket}", server.directory), "news")
    store.activate(store.publish(*random_range_set(601)))
    state = store.set_erasure(erasing("World"))
    mirror = mirrors(store, poll=0.05)
    mirror.start()
    assert mirror.snapshot is not None
    kill(server)
    until(lambda: mirror.problem)
    held, age = mirror.snapshot, mirror.age()
    assert held is not None
    assert held.live == state
    assert not mirror.store_up
    assert "cannot be reached" in mirror.problem
    until(lambda: mirror.age() > age + 0.1)
    assert mirror.snapshot is held
    with pytest.raises(StoreUnavailable):
        mirror.refresh()
    restart(server)
    until(lambda: mirror.store_up and mirror.problem is None)
    assert (mirror.snapshot.live, mirror.snapshot.range_set) == (state, held.range_set)
    assert mirror.snapshot.read_at > held.read_at + age
    store.set_erasures([])
    until(lambda: concepts(mirror.snapshot) == [])


def test_starting_while_redis_is_away(server: EmbeddedServer, mirrors: Mirrors) -> None:
    kill(server)
    store = RangeStore(connect(f"unix://{server.socket}", server.directory), "news")
    mirror = mirrors(store)
    mirror.start()
    assert mirror.snapshot is None
    assert (mirror.store_up, bool(mirror.problem)) == (False, True)
    restart(server)
    until(lambda: mirror.problem is None)
    assert mirror.snapshot is not None
    assert mirror.store_up


def empty(store: RangeStore) -> None:
    """Take out everything of the store's model, as if Redis had been emptied."""
    for published in store.list():
        store.client.delete(*store.client.keys(f"neuronlens:rangeset:{published.id}:*"))
    store.client.delete(store.keys.live, store.keys.audit, store.keys.range_sets)


def test_an_emptied_redis_drops_no_erasure(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors(poll=0.02)
    mirror.start()
    held = mirror.snapshot
    assert held is not None
    empty(active)
    until(lambda: mirror.problem)
    with pytest.raises(StoreUnavailable, match="lost the live state"):
        mirror.refresh()
    assert active.peek() is None, "a worker that knew of erasures creates no state without them"
    assert (concepts(mirror.snapshot), mirror.snapshot.live, mirror.store_up) == (["World"], held.live, True)
    assert f"neuronlens ranges import FILE --activate --name {active.model}" in caplog.text

    newcomer = mirrors()
    newcomer.start()
    assert concepts(newcomer.snapshot) == []
    with pytest.raises(StoreUnavailable, match="begins anew"):
        mirror.refresh()
    assert (concepts(mirror.snapshot), mirror.trouble) == (["World"], "lost"), "that somebody looked is nobody's will"


@pytest.mark.parametrize("activates", [False, True])
def test_what_an_emptied_redis_forgot_is_put_back_with_the_range_set(
    active: RangeStore, mirrors: Mirrors, activates: bool
) -> None:
    """The range set comes back from a file, the erasures from whoever still knows them; nobody sees a state between."""
    seen: list[list[str]] = []
    active.set_erasures([erasing("World"), erasing("Sports", time.time() + 3600)])
    both = [mirrors(poll=0.02, on_change=lambda snapshot: seen.append(concepts(snapshot))) for _ in range(2)]
    for mirror in both:
        mirror.start()
    held = active.live()
    empty(active)
    until(lambda: all(mirror.trouble == "lost" for mirror in both))
    published = active.publish(*random_range_set(600))
    if activates:
        active.activate(published)
    until(lambda: all(mirror.problem is None for mirror in both))
    until(lambda: all(mirror.snapshot.live == active.peek() for mirror in both))
    state = active.live()
    assert (state.erasures, state.range_set) == (held.erasures, published)
    assert state.epoch != held.epoch
    assert all(each == ["Sports", "World"] for each in seen)
    (entry,) = [each for each in active.audit() if each.action == "restore"]
    assert (entry.concepts, entry.by) == (("Sports", "World"), "server")
    assert held.generation in str(entry.reason)
    later = active.remove_erasure("World")
    until(lambda: all(mirror.snapshot.live == later for mirror in both))


def test_what_another_puts_back_meanwhile_makes_no_decision_of_the_state_before(active: RangeStore) -> None:
    """Else who read that state just before would follow it, and erase nothing for a moment."""
    held = active.set_erasure(erasing("World"))
    empty(active)
    active.activate(active.publish(*random_range_set(600)))
    read = active.live()
    assert active.put_back(held).erasures == held.erasures
    assert active.has_forgotten(held, read)
    assert not active.has_forgotten(held, active.live())


def test_what_an_operator_decides_after_the_loss_stands(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    mirror.refresh()
    empty(active)
    active.activate(active.publish(*random_range_set(600)))
    state = active.set_erasures([])
    with caplog.at_level(logging.WARNING):
        assert mirror.refresh().live == state
    assert "no longer erased: World" in caplog.text


def test_what_the_new_range_set_cannot_serve_is_an_operators_matter(active: RangeStore, mirrors: Mirrors) -> None:
    deep = LiveErasure(erasure=Erasure(concept="World", layers=(0,)))
    active.set_erasure(deep)
    mirror = mirrors()
    held = mirror.refresh()
    empty(active)
    active.activate(active.publish(*random_range_set(606, layers=[2])))
    with pytest.raises(StoreUnavailable, match="cannot serve what was erased"):
        mirror.refresh()
    assert mirror.snapshot is held
    state = active.set_erasure(erasing("World"))
    assert mirror.refresh().live == state


def test_an_old_copy_of_redis_undoes_nothing(active: RangeStore, mirrors: Mirrors) -> None:
    before = active.client.get(active.keys.live)
    active.set_erasure(erasing("World"))
    held = active.set_erasure(erasing("Sports"))
    mirror = mirrors()
    mirror.refresh()
    active.client.set(active.keys.live, before)
    state = mirror.refresh().live
    assert state == active.peek()
    assert (state.epoch, state.counter) == (held.epoch, held.counter + 1)
    assert (state.erasures, state.range_set) == (held.erasures, held.range_set)
    assert active.audit(1)[0].action == "restore"


def test_an_old_copy_without_the_active_range_set_waits_for_it(active: RangeStore, mirrors: Mirrors) -> None:
    copy = active.client.get(active.keys.live)
    second, inspect = random_range_set(607)
    active.publish(second, inspect)
    active.activate(second.id)
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    held = mirror.refresh()
    active.client.set(active.keys.live, copy)
    active.remove(second.id)
    with pytest.raises(StoreUnavailable, match="went back"):
        mirror.refresh()
    assert mirror.snapshot is held
    active.publish(second, inspect)
    assert mirror.refresh().live == held.live.model_copy(
        update={"generation": f"{held.live.epoch}-{held.live.counter + 1}"}
    )


def test_a_slow_read_never_overwrites_a_newer_one(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    mirror.refresh()
    peek = active.peek
    inside, go_on = threading.Event(), threading.Event()

    def slow_peek() -> LiveState | None:
        found = peek()
        if threading.current_thread() is slow:
            inside.set()
            assert go_on.wait(20)
        return found

    active.peek = slow_peek  # type: ignore[method-assign]
    slow = threading.Thread(target=mirror.refresh)
    slow.start()
    assert inside.wait(20)
    state = active.set_erasure(erasing("World"))
    fast = threading.Thread(target=mirror.refresh)
    fast.start()
    fast.join(0.2)  # it waits for the slow one, or else is done before it
    go_on.set()
    slow.join()
    fast.join()
    assert mirror.snapshot is not None
    assert mirror.snapshot.live == state


def test_a_range_set_of_another_model_is_refused(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors(poll=0.02)
    mirror.start()
    held = mirror.snapshot
    assert held is not None
    foreign = active.publish(*random_range_set(602, fingerprint="ef" * 32))
    with caplog.at_level(logging.ERROR):
        active.activate(foreign)
        until(lambda: mirror.problem)
        for _ in range(5):
            with pytest.raises(ForeignRangeSet, match="efefef"):
                mirror.refresh()
    assert len([each for each in caplog.records if "efefef" in each.message]) == 1, "logged once"
    assert (mirror.snapshot.live, mirror.snapshot.range_set) == (held.live, held.range_set)
    assert mirror.store_up
    state = active.activate(str(held.live.range_set))
    until(lambda: mirror.problem is None)
    assert mirror.snapshot.live == state


def test_a_foreign_range_set_at_the_start_is_no_snapshot(store: RangeStore, mirrors: Mirrors) -> None:
    store.activate(store.publish(*random_range_set(603, fingerprint="ef" * 32)))
    mirror = mirrors()
    mirror.start()
    assert mirror.snapshot is None
    assert "fitted on" in str(mirror.problem)


def test_a_corrupt_range_set_keeps_the_last_good_one(active: RangeStore, mirrors: Mirrors) -> None:
    mirror, fresh = mirrors(), mirrors()
    held = mirror.refresh()
    second, inspect = random_range_set(604)
    active.publish(second, inspect)
    active.activate(second.id)
    active.client.setrange(part_key(second.id, "layer:1:serve"), 300, b"\0\0")
    for each, snapshot in ((mirror, held), (fresh, None)):
        with pytest.raises(InvalidRangeSet, match="corrupt"):
            each.refresh()
        assert each.snapshot is snapshot
        assert each.store_up
    active.publish(second, inspect)
    for each in (mirror, fresh):
        assert each.refresh().live.range_set == second.id
        assert each.problem is None


def test_an_unreadable_live_state_keeps_the_last_good_one(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh()
    active.client.set(active.keys.live, "nonsense")
    with pytest.raises(InvalidRangeSet):
        mirror.refresh()
    assert mirror.snapshot is held
    assert "unreadable" in str(mirror.problem)


def test_an_active_range_set_that_is_gone_keeps_the_last_good_one(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh()
    nowhere = held.live.advanced("0" * 20, ())
    active.client.set(active.keys.live, nowhere.model_dump_json())
    with pytest.raises(UnknownRangeSet):
        mirror.refresh()
    assert mirror.snapshot is held


def test_a_range_set_is_loaded_only_when_another_one_is_active(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh().range_set
    active.set_erasure(erasing("World"))
    assert mirror.refresh().range_set is held
    second = active.publish(*random_range_set(605))
    active.activate(second)
    found = mirror.refresh().range_set
    assert found is not None
    assert found.id == second


def test_expired_erasures_are_swept_when_they_are_due(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=NEVER)
    mirror.start()
    due = {"World": time.time() + 0.2, "Sports": time.time() + 0.5}
    state = active.set_erasures([*(erasing(concept, at) for concept, at in due.items()), erasing("Business")])
    until(lambda: concepts(mirror.snapshot) == ["Business"])
    swept = [each for each in active.audit() if each.action == "expire"]
    assert sorted(concept for each in swept for concept in each.concepts) == ["Sports", "World"]
    assert active.live().counter == state.counter + len(swept)
    for entry in swept:
        for concept in entry.concepts:
            assert due[concept] - 0.01 <= entry.at < due[concept] + 60


def test_every_change_is_told_once_and_in_order(
    active: RangeStore, redis_client: redis.Redis, mirrors: Mirrors
) -> None:
    told: list[str] = []

    def listen(snapshot: Snapshot) -> None:
        told.append(snapshot.live.generation)
        raise RuntimeError("a listener that fails must not stop the mirror")

    mirror = mirrors(poll=0.02, on_change=listen)
    mirror.start()
    expected = [active.live().generation]
    for concept in ("World", "Sports", "Business"):
        expected.append(active.set_erasure(erasing(concept)).generation)
        until(lambda: told == expected)


def test_closing_ends_the_thread_and_keeps_the_snapshot(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    mirror.start()
    mirror.start()
    mirror.close()
    assert mirror._thread is not None
    assert not mirror._thread.is_alive()
    assert mirror.snapshot is not None


def test_a_redis_that_refuses_to_sweep_is_not_hammered(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors(poll=NEVER)
    tries: list[float] = []

    def expire(now: float) -> LiveState | None:
        tries.append(now)
        raise StoreUnavailable("read-only replica")

    active.expire = expire  # type: ignore[method-assign]
    active.set_erasures([erasing("World", time.time() - 1)])
    mirror.start()
    until(lambda: len(tries) >= 5)
    assert tries[4] - tries[0] > 0.8
