"""A mirror never drops an erasure that it holds: Redis may go away, lose data, or hold something unusable."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure, LiveState
from range_store.embedded.connection import connect
from range_store.embedded.server import EmbeddedServer
from range_store.errors import ForeignRangeSet, InvalidRangeSet, StoreUnavailable, UnknownRangeSet
from range_store.storage.mirror import Mirror
from range_store.storage.schema import part_key
from range_store.storage.store import RangeStore
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
    store.activate(store.range_sets.publish(*random_range_set(601)))
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
    assert active.read_live_state() is None, "a worker that knew of erasures creates no state without them"
    assert (concepts(mirror.snapshot), mirror.snapshot.live, mirror.store_up) == (["World"], held.live, True)
    assert f"neuronlens ranges import FILE --activate --name {active.model}" in caplog.text

    newcomer = mirrors()
    newcomer.start()
    assert concepts(newcomer.snapshot) == []
    with pytest.raises(StoreUnavailable, match="starts again"):
        mirror.refresh()
    assert (concepts(mirror.snapshot), mirror.problem_kind) == (["World"], "lost"), "reading is no decision"


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
    held = active.live_state()
    empty(active)
    until(lambda: all(mirror.problem_kind == "lost" for mirror in both))
    published = active.range_sets.publish(*random_range_set(600))
    if activates:
        active.activate(published)
    until(lambda: all(mirror.problem is None for mirror in both))
    until(lambda: all(mirror.snapshot.live == active.read_live_state() for mirror in both))
    state = active.live_state()
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
    active.activate(active.range_sets.publish(*random_range_set(600)))
    read = active.live_state()
    state, put_back = active.restore(held)
    assert (state.erasures, put_back) == (held.erasures, True)
    assert active.recovered(held, read) is not None
    assert active.recovered(held, active.live_state()) is None
    assert active.restore(held) == (state, False)


def test_decision_after_the_loss_is_kept(active: RangeStore, mirrors: Mirrors) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    mirror.refresh()
    empty(active)
    active.activate(active.range_sets.publish(*random_range_set(600)))
    state = active.set_erasures([])
    assert mirror.refresh().live == state


def test_unservable_erasure_is_kept_but_not_restored(active: RangeStore, mirrors: Mirrors) -> None:
    deep = LiveErasure(erasure=Erasure(concept="World", layers=(0,)))
    active.set_erasure(deep)
    mirror = mirrors()
    held = mirror.refresh()
    empty(active)
    active.activate(active.range_sets.publish(*random_range_set(606, layers=[2])))
    with pytest.raises(StoreUnavailable, match="cannot serve the earlier erasures"):
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
    assert state == active.read_live_state()
    assert state.epoch != held.epoch, "the generations that the copy lacks are never used again"
    assert state.is_at_least(held.generation)
    assert (state.erasures, state.range_set) == (held.erasures, held.range_set)
    assert active.audit(1)[0].action == "restore"


def test_old_copy_is_restored_once_the_range_set_is_back(active: RangeStore, mirrors: Mirrors) -> None:
    copy = active.client.get(active.keys.live)
    second, inspect = random_range_set(607)
    active.range_sets.publish(second, inspect)
    active.activate(second.id)
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    held = mirror.refresh()
    active.client.set(active.keys.live, copy)
    active.range_sets.remove(second.id)
    with pytest.raises(StoreUnavailable, match="went back"):
        mirror.refresh()
    assert mirror.snapshot is held
    active.range_sets.publish(second, inspect)
    state = mirror.refresh().live
    assert (state.range_set, state.erasures) == (second.id, held.live.erasures)


def test_foreign_range_set_at_the_start_gives_no_snapshot(store: RangeStore, mirrors: Mirrors) -> None:
    store.activate(store.range_sets.publish(*random_range_set(603, fingerprint="ef" * 32)))
    mirror = mirrors()
    mirror.start()
    assert mirror.snapshot is None
    assert "fitted on" in str(mirror.problem)


def test_corrupt_range_set_keeps_the_last_good_snapshot(active: RangeStore, mirrors: Mirrors) -> None:
    mirror, fresh = mirrors(), mirrors()
    held = mirror.refresh()
    second, inspect = random_range_set(604)
    active.range_sets.publish(second, inspect)
    active.activate(second.id)
    active.client.setrange(part_key(second.id, "layer:1:serve"), 300, b"\0\0")
    for each, snapshot in ((mirror, held), (fresh, None)):
        with pytest.raises(InvalidRangeSet, match="corrupt"):
            each.refresh()
        assert each.snapshot is snapshot
        assert each.store_up
    active.range_sets.publish(second, inspect)
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
    nowhere = held.live.next_generation("0" * 20, ())
    active.client.set(active.keys.live, nowhere.model_dump_json())
    with pytest.raises(UnknownRangeSet):
        mirror.refresh()
    assert mirror.snapshot is held


def enforced(concept: str) -> LiveErasure:
    return LiveErasure(erasure=Erasure(concept=concept), enforced=True)


def named(state: LiveState) -> list[str]:
    return [each.concept for each in state.erasures]


def guarded(store: RangeStore, mirrors: Mirrors) -> Mirror:
    """A mirror that has read the store, and that guards its changes, as in a server."""
    mirror = mirrors()
    mirror.refresh()
    store.before_change = mirror.before_change
    return mirror


@pytest.fixture
def operator(store: RangeStore) -> RangeStore:
    """The same store as another process sees it that holds nothing, such as the command line."""
    return RangeStore(store.client, store.model)


@pytest.mark.parametrize("activates", [False, True])
def test_a_server_restores_before_it_changes_anything(
    active: RangeStore, operator: RangeStore, mirrors: Mirrors, activates: bool
) -> None:
    """Redis is emptied, the range set comes back, and a change arrives before the server has looked."""
    active.set_erasure(enforced("Sports"))
    mirror = guarded(active, mirrors)
    empty(active)
    published = operator.range_sets.publish(*random_range_set(600))
    if activates:
        operator.activate(published)
    state = active.set_erasure(erasing("World"))
    assert named(state) == ["Sports", "World"]
    assert state.erasures[0].enforced
    assert [entry.action for entry in active.audit()][:2] == ["set", "restore"]
    assert mirror.refresh().live == state


def test_a_change_is_refused_while_nothing_can_be_restored(
    active: RangeStore, operator: RangeStore, mirrors: Mirrors
) -> None:
    active.set_erasure(enforced("Sports"))
    mirror = guarded(active, mirrors)
    empty(active)
    for change in (lambda: active.set_erasure(erasing("World")), lambda: active.set_erasures([])):
        with pytest.raises(StoreUnavailable, match="lost the live state"):
            change()
    assert operator.read_live_state() is None
    other = active.range_sets.publish(*random_range_set(608))
    state = active.activate(other)
    assert state.range_set == other, "activating another range set is the way out"
    assert named(mirror.refresh().live) == ["Sports"]


def test_only_naming_it_drops_an_enforced_erasure(active: RangeStore, operator: RangeStore, mirrors: Mirrors) -> None:
    """A process that holds nothing may change an emptied Redis first: what it does not name comes back."""
    active.set_erasures([enforced("Sports"), enforced("Business"), erasing("World")])
    mirror = mirrors()
    mirror.refresh()
    empty(active)
    operator.activate(operator.range_sets.publish(*random_range_set(600)))
    operator.set_erasure(erasing("Sci/Tech"))
    operator.remove_erasure("Business")  # it is not there, so nothing is decided
    assert named(mirror.refresh().live) == ["Business", "Sci/Tech", "Sports", "World"]

    held = active.live_state()
    empty(active)
    operator.activate(operator.range_sets.publish(*random_range_set(600)))
    operator.set_erasure(erasing("Sports"))
    operator.remove_erasure("Sports")
    operator.set_erasures([erasing("Sci/Tech")])
    state = mirror.refresh().live
    assert named(state) == ["Business", "Sci/Tech"], "Sports was named; World, not enforced, was replaced"
    assert state.is_at_least(held.generation)


def test_servers_that_held_different_generations_agree_on_the_newest(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    """An older copy of Redis returns; the server that knows less restores first."""
    copy = active.client.get(active.keys.live)
    behind, ahead = mirrors(), mirrors()
    active.set_erasures([enforced("Sports"), erasing("Business")])
    first = behind.refresh().live
    active.set_erasure(erasing("World"))
    newest = active.remove_erasure("Business")
    ahead.refresh()
    active.client.set(active.keys.live, copy)
    restored = behind.refresh().live
    assert named(restored) == ["Business", "Sports"]
    final = ahead.refresh().live
    assert named(final) == named(newest) == ["Sports", "World"]
    assert behind.refresh().live == ahead.refresh().live == final
    generations = [first.generation, newest.generation, restored.generation, final.generation]
    assert len({generation.split("-")[0] for generation in generations}) == 3
    assert all(final.is_at_least(generation) for generation in generations)
    assert sum("restored as" in record.message for record in caplog.records) == 2


def test_the_same_generation_with_other_erasures_is_no_newer_state(
    active: RangeStore, operator: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    copy = active.client.get(active.keys.live)
    held = active.set_erasure(enforced("Sports"))
    mirror = mirrors()
    mirror.refresh()
    active.client.set(active.keys.live, copy)
    assert operator.set_erasure(erasing("World")).generation == held.generation
    state = mirror.refresh().live
    assert named(state) == ["Sports"]
    assert state.generation != held.generation
    assert f"Redis holds another state as generation {held.generation}" in caplog.text


def test_a_restore_by_another_server_is_logged_by_that_one_alone(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasure(erasing("World"))
    both = [mirrors(), mirrors()]
    for mirror in both:
        mirror.refresh()
    empty(active)
    active.range_sets.publish(*random_range_set(600))
    for mirror in both:
        mirror.refresh()
    assert sum("restored as" in record.message for record in caplog.records) == 1
    assert [entry.action for entry in active.audit()].count("restore") == 1


def test_no_change_is_made_on_a_range_set_of_another_model(
    active: RangeStore, operator: RangeStore, mirrors: Mirrors
) -> None:
    active.set_erasure(erasing("World"))
    guarded(active, mirrors)
    state = operator.activate(operator.range_sets.publish(*random_range_set(603, fingerprint="ef" * 32)))
    for change in (
        lambda: active.set_erasure(erasing("Sports")),
        lambda: active.remove_erasure("World"),
        lambda: active.set_erasures([]),
    ):
        with pytest.raises(ForeignRangeSet):
            change()
    assert operator.live_state() == state
    own = active.range_sets.publish(*random_range_set(600))
    assert active.activate(own).range_set == own
