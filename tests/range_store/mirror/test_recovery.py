"""A mirror never drops what it knows: Redis may go away, forget, or hold something unusable (DESIGN promise 5)."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from range_store.embedded import connect
from range_store.embedded_server import EmbeddedServer
from range_store.erasure import Erasure
from range_store.errors import InvalidRangeSet, StoreUnavailable, UnknownRangeSet
from range_store.keys import part_key
from range_store.live import LiveErasure
from range_store.store import RangeStore
from tests.range_store.builders import random_range_set
from tests.range_store.mirror.controlled import Mirrors, concepts, empty, erasing
from tests.range_store.waiting import until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A Redis server of this test's own, to kill."""
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


def test_snapshot_outlives_redis_and_is_renewed_after_its_return(server: EmbeddedServer, mirrors: Mirrors) -> None:
    """The last good snapshot stays and tells its age; after the return the mirror follows the store again."""
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


def test_mirror_starts_while_redis_is_away(server: EmbeddedServer, mirrors: Mirrors) -> None:
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


def test_emptied_redis_drops_no_erasure(active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture) -> None:
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
    assert (concepts(mirror.snapshot), mirror.trouble) == (["World"], "lost"), "reading is no decision"


@pytest.mark.parametrize("activates", [False, True])
def test_forgotten_erasures_are_restored_with_the_range_set(
    active: RangeStore, mirrors: Mirrors, activates: bool
) -> None:
    """The range set comes back from a file, the erasures from the mirrors that hold them; no mirror sees a gap."""
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


def test_concurrent_restore_is_no_decision_about_the_state_before_it(active: RangeStore) -> None:
    """Otherwise a mirror that read that state just before would follow it, and erase nothing for a moment."""
    held = active.set_erasure(erasing("World"))
    empty(active)
    active.activate(active.publish(*random_range_set(600)))
    read = active.live()
    assert active.put_back(held).erasures == held.erasures
    assert active.has_forgotten(held, read)
    assert not active.has_forgotten(held, active.live())


def test_decision_after_the_loss_is_kept(active: RangeStore, mirrors: Mirrors) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    mirror.refresh()
    empty(active)
    active.activate(active.publish(*random_range_set(600)))
    state = active.set_erasures([])
    assert mirror.refresh().live == state


def test_unservable_erasure_is_kept_but_not_restored(active: RangeStore, mirrors: Mirrors) -> None:
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


def test_old_copy_of_redis_undoes_nothing(active: RangeStore, mirrors: Mirrors) -> None:
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


def test_old_copy_is_restored_once_the_range_set_is_back(active: RangeStore, mirrors: Mirrors) -> None:
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


def test_foreign_range_set_at_the_start_gives_no_snapshot(store: RangeStore, mirrors: Mirrors) -> None:
    store.activate(store.publish(*random_range_set(603, fingerprint="ef" * 32)))
    mirror = mirrors()
    mirror.start()
    assert mirror.snapshot is None
    assert "fitted on" in str(mirror.problem)


def test_corrupt_range_set_keeps_the_last_good_snapshot(active: RangeStore, mirrors: Mirrors) -> None:
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


def test_unreadable_state_keeps_the_last_good_snapshot(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh()
    active.client.set(active.keys.live, "nonsense")
    with pytest.raises(InvalidRangeSet):
        mirror.refresh()
    assert mirror.snapshot is held
    assert "unreadable" in str(mirror.problem)


def test_missing_range_set_keeps_the_last_good_snapshot(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh()
    nowhere = held.live.advanced("0" * 20, ())
    active.client.set(active.keys.live, nowhere.model_dump_json())
    with pytest.raises(UnknownRangeSet):
        mirror.refresh()
    assert mirror.snapshot is held
