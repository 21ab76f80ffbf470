"""The live state on a real Redis: generations, compare-and-set, expiry and the audit log."""

import threading
import time

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure, LiveState, initial_state, is_at_least, new_epoch
from range_store.errors import (
    InvalidErasure,
    InvalidRangeSet,
    NoRangeSet,
    NotFitted,
    StaleGeneration,
    StoreUnavailable,
    UnknownConcept,
    UnknownRangeSet,
    UnresolvableErasure,
)
from range_store.storage.clock import StoreClock
from range_store.storage.schema import CHANGES
from range_store.storage.store import RangeStore
from tests.range_store.builders import CONCEPTS, random_range_set
from tests.range_store.waiting import until


def erasing(concept: str, **settings: object) -> LiveErasure:
    live = {key: settings.pop(key) for key in ("enforced", "reason", "expires_at", "by") if key in settings}
    return LiveErasure.model_validate({"erasure": {"concept": concept, **settings}, **live})


def concepts(state: LiveState) -> list[str]:
    return [each.concept for each in state.erasures]


@pytest.fixture
def active(store: RangeStore) -> RangeStore:
    store.activate(store.range_sets.publish(*random_range_set(1)))
    return store


def test_concurrent_first_reads_create_one_state(store: RangeStore) -> None:
    assert store.read_live_state() is None
    found: list[LiveState] = []
    threads = [threading.Thread(target=lambda: found.append(store.live_state())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(map(LiveState.model_dump_json, found)) == {store.read_live_state().model_dump_json()}
    assert (found[0].counter, found[0].range_set, found[0].erasures) == (0, None, ())
    assert [each.action for each in store.audit()] == ["create"]


def test_every_creation_starts_a_new_epoch(store: RangeStore) -> None:
    epochs = set()
    for _ in range(5):
        epochs.add(store.live_state().epoch)
        store.client.delete(store.keys.live)
    assert len(epochs) == 5


def test_every_change_increments_the_generation_and_is_audited(active: RangeStore) -> None:
    epoch = active.live_state().epoch
    active.set_erasure(erasing("World", by="ann", reason="trial"))
    active.set_erasures([erasing("Sports"), erasing("Business")], by="ben", reason="policy")
    active.remove_erasure("Sports", by="cem")
    state = active.live_state()
    assert (state.generation, concepts(state)) == (f"{epoch}-4", ["Business"])
    audit = active.audit()
    assert [(each.action, each.by, each.reason, each.concepts) for each in audit[:3]] == [
        ("remove", "cem", None, ("Sports",)),
        ("replace", "ben", "policy", ("Business", "Sports", "World")),
        ("set", "ann", "trial", ("World",)),
    ]
    assert [each.action for each in audit[3:]] == ["activate", "create"]
    assert [each.after for each in audit[1:]] == [each.before for each in audit[:-1]], "generations form a chain"
    assert audit[0].after == state.generation
    assert audit == sorted(audit, key=lambda each: each.at, reverse=True)
    assert [each.action for each in active.audit(limit=2)] == ["remove", "replace"]


def test_a_request_is_told_from_all_others_among_the_last_changes(
    active: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("range_store.storage.store.RECENT", 5)
    active.set_erasure(erasing("World"), request="a")
    active.set_erasures([erasing("Sports")], request="b")
    active.remove_erasure("Sports", request="c")
    active.activate(active.live_state().range_set or "", request="d")
    active.set_erasure(erasing("World"))
    assert [active.has_change_for(each) for each in ("a", "b", "c", "d", "e")] == [True] * 4 + [False]
    with pytest.raises(StaleGeneration):
        active.set_erasure(erasing("World"), if_match="00000000-0", request="e")
    active.set_erasure(erasing("Sports"), request="f")
    assert [active.has_change_for(each) for each in ("a", "b", "e", "f")] == [False, True, False, True]


def test_erasures_are_sorted_by_concept(active: RangeStore) -> None:
    state = active.set_erasures([erasing(concept) for concept in ("World", "Business", "Sports", "Sci/Tech")])
    assert concepts(state) == sorted(CONCEPTS)
    assert concepts(active.live_state()) == sorted(CONCEPTS)


def test_setting_an_erasure_again_replaces_it(active: RangeStore) -> None:
    active.set_erasure(erasing("World", tau=1.0))
    state = active.set_erasure(erasing("World", tau=3.0, enforced=True))
    assert [(each.erasure.tau, each.enforced) for each in state.erasures] == [(3.0, True)]


def test_remove_is_idempotent(active: RangeStore) -> None:
    before = active.live_state()
    assert active.remove_erasure("World") == before
    assert active.live_state() == before
    with pytest.raises(UnknownConcept, match="Weather"):
        active.remove_erasure("Weather")


def test_unresolvable_erasure_is_rejected(active: RangeStore) -> None:
    before = active.live_state()
    for erasure, error in (
        (erasing("Weather"), UnknownConcept),
        (erasing("World", layers=(3,)), InvalidErasure),
        (erasing("World", layers=(-1, 2)), InvalidErasure),
    ):
        with pytest.raises(error):
            active.set_erasure(erasure)
        with pytest.raises(error):
            active.set_erasures([erasing("Sports"), erasure])
    with pytest.raises(InvalidErasure, match="twice"):
        active.set_erasures([erasing("World"), erasing("World", tau=1.0)])
    assert active.live_state() == before


def test_erasing_without_a_range_set_is_rejected(store: RangeStore) -> None:
    for call in (lambda: store.set_erasure(erasing("World")), lambda: store.set_erasures([erasing("World")])):
        with pytest.raises(NoRangeSet, match="neuronlens fit"):
            call()
    assert store.set_erasures([]).erasures == ()


def test_stale_generation_is_rejected_and_changes_nothing(active: RangeStore) -> None:
    read = active.live_state().generation
    moved = active.set_erasure(erasing("World"), if_match=read)
    for change in (
        lambda: active.set_erasure(erasing("Sports"), if_match=read),
        lambda: active.set_erasures([], if_match=read),
        lambda: active.remove_erasure("World", if_match=read),
        lambda: active.remove_erasure("Sports", if_match=read),
        lambda: active.activate(str(moved.range_set), if_match=read),
    ):
        with pytest.raises(StaleGeneration) as caught:
            change()
        assert (caught.value.expected, caught.value.current) == (read, moved.generation)
    assert active.live_state() == moved


def test_concurrent_changes_lose_no_update(active: RangeStore) -> None:
    """Four threads each toggle their own concept: every change is audited, and none undoes another."""
    rounds = 10

    def switch(concept: str) -> None:
        for n in range(rounds):
            active.set_erasure(erasing(concept, tau=float(n), by=concept))
            if n < rounds - 1:
                active.remove_erasure(concept, by=concept)

    begin = active.live_state().counter
    threads = [threading.Thread(target=switch, args=(concept,)) for concept in CONCEPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = active.live_state()
    assert {each.concept: each.erasure.tau for each in state.erasures} == dict.fromkeys(CONCEPTS, rounds - 1.0)
    changes = len(CONCEPTS) * (2 * rounds - 1)
    assert state.counter == begin + changes
    audit = active.audit(limit=changes)
    assert len({each.after for each in audit}) == changes
    assert {concept: sum(each.by == concept for each in audit) for concept in CONCEPTS} == dict.fromkeys(
        CONCEPTS, 2 * rounds - 1
    )


def test_one_of_several_conditional_changes_succeeds(active: RangeStore) -> None:
    read = active.live_state().generation
    outcomes: list[str] = []

    def change(concept: str) -> None:
        try:
            active.set_erasure(erasing(concept), if_match=read)
            outcomes.append("done")
        except StaleGeneration:
            outcomes.append("stale")

    threads = [threading.Thread(target=change, args=(concept,)) for concept in CONCEPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["done", "stale", "stale", "stale"]


def test_repeated_write_is_applied_once(active: RangeStore) -> None:
    raw, state = active._read()
    assert state is not None
    after = state.next_generation(state.range_set, (erasing("World"),))
    for _ in range(2):
        assert active._write(raw, after, [])
    assert active.live_state() == after


def test_expiry_applies_at_its_time_and_is_audited(active: RangeStore) -> None:
    due = time.time() + 1e9  # far ahead: the clock passes it only where this test says so
    state = active.set_erasures([erasing("World", expires_at=due), erasing("Sports")])
    assert state.next_expiry == due
    assert [each.concept for each in state.active_at(due - 1)] == ["Sports", "World"]
    assert [each.concept for each in state.active_at(due)] == ["Sports"]
    assert active.expire(due - 1) == state, "nothing is due yet"
    after = active.expire(due)
    assert after is not None
    assert (concepts(after), after.counter) == (["Sports"], state.counter + 1)
    entry = active.audit(1)[0]
    assert (entry.action, entry.concepts, entry.before, entry.after) == (
        "expire",
        ("World",),
        state.generation,
        after.generation,
    )
    assert active.expire(due) == after


def test_expire_creates_no_state(store: RangeStore) -> None:
    assert store.expire(time.time()) is None
    assert store.read_live_state() is None


def test_change_removes_expired_erasures_first(active: RangeStore) -> None:
    state = active.set_erasures([erasing("World", expires_at=time.time() - 1)])
    after = active.set_erasure(erasing("Sports"), if_match=state.generation)
    assert (concepts(after), after.counter) == (["Sports"], state.counter + 2)
    assert [each.action for each in active.audit(2)] == ["set", "expire"]


def test_range_set_without_a_live_concept_is_activated_only_by_force(active: RangeStore) -> None:
    active.set_erasures(
        [erasing("World", layers=(0,)), erasing("Sports", layers=(2,)), erasing("Business", layers=(2,))]
    )
    before = active.live_state()
    fewer, inspect = random_range_set(2, concepts=("Sports", "World"), layers=(0, 1))
    active.range_sets.publish(fewer, inspect)
    with pytest.raises(UnresolvableErasure, match=r"'Business', 'Sports'.*force"):
        active.activate(fewer.id)
    assert active.live_state() == before
    after = active.activate(fewer.id, force=True, by="ann")
    assert (after.range_set, concepts(after), after.counter) == (fewer.id, ["World"], before.counter + 1)
    entry = active.audit(1)[0]
    assert (entry.action, entry.range_set, entry.dropped, entry.by) == (
        "activate",
        fewer.id,
        ("Business", "Sports"),
        "ann",
    )
    with pytest.raises(NotFitted):
        active.set_erasure(erasing("Sports", layers=(2,)))


def test_not_even_force_drops_an_enforced_erasure(active: RangeStore) -> None:
    before = active.set_erasures([erasing("Sports", layers=(2,)), erasing("Business", layers=(2,), enforced=True)])
    fewer = active.range_sets.publish(*random_range_set(2, concepts=("Sports", "World"), layers=(0, 1)))
    for force in (False, True):
        with pytest.raises(UnresolvableErasure, match=r"of 'Business' \([^)]*\): switch them off first"):
            active.activate(fewer, force=force)
    assert active.live_state() == before
    active.remove_erasure("Business")
    assert concepts(active.activate(fewer, force=True)) == []


def test_expired_erasure_does_not_block_activation(active: RangeStore) -> None:
    active.set_erasures([erasing("World", expires_at=time.time() - 1)])
    other, inspect = random_range_set(3, concepts=("Sports",))
    active.range_sets.publish(other, inspect)
    assert active.activate(other.id).erasures == ()


def test_earlier_range_set_can_be_activated_again(active: RangeStore) -> None:
    first = active.live_state().range_set
    second = active.range_sets.publish(*random_range_set(4))
    active.activate(second)
    assert active.activate(str(first)).range_set == first


def test_removed_range_set_cannot_be_activated(active: RangeStore) -> None:
    candidate = active.range_sets.publish(*random_range_set(5))
    read = active.range_sets.read

    def removed_meanwhile(id_: str) -> object:
        found = read(id_)
        active.range_sets.remove(id_)
        return found

    active.range_sets.read = removed_meanwhile  # type: ignore[assignment,method-assign]
    before = active.live_state()
    with pytest.raises(UnknownRangeSet):
        active.activate(candidate)
    assert active.live_state() == before


def test_every_change_is_published_to_subscribers(active: RangeStore, redis_client: redis.Redis) -> None:
    with redis_client.pubsub(ignore_subscribe_messages=True) as feed:
        feed.subscribe(CHANGES)
        feed.get_message(timeout=1)
        active.set_erasure(erasing("World"))
        told = active.keys.hint.encode()
        until(lambda: (message := feed.get_message(timeout=0.1)) and message["data"] == told)  # others tell here too


def test_unreadable_state_is_rejected_and_kept(active: RangeStore) -> None:
    for stored in (b"", b"[]", b"\xff", b'{"generation": "x", "range_set": null, "erasures": []}'):
        active.client.set(active.keys.live, stored)
        for call in (
            active.read_live_state,
            active.live_state,
            lambda: active.set_erasures([]),
            lambda: active.expire(0.0),
        ):
            with pytest.raises(InvalidRangeSet, match="unreadable"):
                call()
        assert active.client.get(active.keys.live) == stored


def test_keys_of_another_type_give_a_clear_error(store: RangeStore) -> None:
    store.client.lpush(store.keys.live, "x")
    store.client.set(store.keys.audit, "x")
    for call in (store.read_live_state, store.audit):
        with pytest.raises(StoreUnavailable, match="another application"):
            call()


CONCEPT_NAMES = st.text('aZé漢 "\\/', min_size=1, max_size=4)


@given(st.lists(st.tuples(CONCEPT_NAMES, st.none() | st.floats(0, 100)), unique_by=lambda e: e[0]))
def test_state_survives_a_json_round_trip(each: list[tuple[str, float | None]]) -> None:
    erasures = tuple(erasing(concept, expires_at=at) for concept, at in each)
    state = LiveState(generation="0123abcd-7", range_set=None, erasures=erasures)
    assert LiveState.model_validate_json(state.model_dump_json()) == state
    assert concepts(state) == sorted(concept for concept, _ in each)
    for now in (0.0, 50.0, 100.0):
        assert {e.concept for e in state.active_at(now)} == {c for c, at in each if at is None or at > now}
    assert state.next_expiry == min((at for _, at in each if at is not None), default=None)


def test_advanced_state_is_the_next_generation() -> None:
    state = LiveState(generation="0123abcd-7", range_set="one", erasures=(erasing("World"),))
    after = state.next_generation("two", (erasing("Sports"),))
    assert (state.epoch, state.counter) == ("0123abcd", 7)
    assert (after.generation, after.range_set, concepts(after)) == ("0123abcd-8", "two", ["Sports"])


def test_new_state_is_empty_and_at_generation_zero() -> None:
    state = initial_state()
    assert (state.counter, state.range_set, state.erasures, state.next_expiry) == (0, None, (), None)
    assert state.epoch != initial_state().epoch


@given(st.sampled_from(["00000000", "0000000a"]), st.integers(0, 12), st.sampled_from(["00000000", "0000000a"]))
def test_later_generation_of_the_same_epoch_reaches_an_earlier_one(epoch: str, counter: int, other: str) -> None:
    state = LiveState(generation=f"{epoch}-{counter}", range_set=None, erasures=())
    for wanted in range(13):
        expected = epoch == other and counter >= wanted
        assert is_at_least(state.generation, f"{other}-{wanted}") is expected
        assert state.is_at_least(f"{other}-{wanted}") is expected


@pytest.mark.parametrize(("expires_at", "expired"), [(None, False), (99.0, True), (100.0, True), (100.5, False)])
def test_erasure_expires_at_its_time(expires_at: float | None, expired: bool) -> None:
    assert erasing("World", expires_at=expires_at).expired(100.0) is expired


def test_duplicate_concept_error_is_a_validation_error() -> None:
    twice = (erasing("World"), erasing("World", tau=1.0))
    with pytest.raises(ValidationError, match="concept 'World' is named twice"):
        LiveState(generation="0123abcd-7", range_set=None, erasures=twice)


def test_invalid_state_is_rejected() -> None:
    twice = [LiveErasure(erasure=Erasure(concept="World"))] * 2
    for wrong in (
        {"generation": "0123abcd-7", "range_set": None, "erasures": twice},
        {"generation": "0123abcd-07", "range_set": None, "erasures": []},
        {"generation": "0123ABCD-7", "range_set": None, "erasures": []},
        {"generation": "0123abcd-7", "range_set": None, "erasures": [], "more": 1},
    ):
        with pytest.raises(ValidationError):
            LiveState.model_validate(wrong)


def test_a_wrong_clock_of_a_server_ends_no_erasure(active: RangeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expiry goes by Redis's time, which all servers share."""
    real = time.time()
    monkeypatch.setattr("range_store.storage.clock.time.time", lambda: real + 3600)
    ahead = RangeStore(active.client, active.model)
    assert ahead.clock.now() == real + 3600, "nothing was read yet"
    ahead.live_state()
    now = ahead.clock.now()
    assert now - real < 600
    ends = now + 600
    ahead.set_erasure(erasing("World", expires_at=ends))
    assert concepts(ahead.expire(ahead.clock.now())) == ["World"]
    assert concepts(ahead.set_erasure(erasing("Sports"))) == ["Sports", "World"]


def test_between_reads_the_clock_goes_on_by_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis answered half-way between the call and its answer."""
    clock = StoreClock()
    monotonic = iter([7.0, 10.0])
    monkeypatch.setattr("range_store.storage.clock.time.monotonic", lambda: next(monotonic))
    clock.set(1000.0, began=5.0)
    assert clock.now() == 1004.0


def test_a_continued_state_reaches_every_generation_that_it_took_over() -> None:
    older = LiveState(generation="0000000a-7", range_set=None, erasures=(), continues=("0000000b-3", "0000000c-1"))
    newer = LiveState(generation="0000000b-5", range_set=None, erasures=())
    state = new_epoch([newer, older], "one", (erasing("World"),))
    assert (state.counter, state.range_set, concepts(state)) == (1, "one", ["World"])
    assert state.epoch not in {"0000000a", "0000000b", "0000000c"}
    assert state.continues == ("0000000b-5", "0000000a-7", "0000000c-1")
    assert all(state.is_at_least(each) for each in (*state.continues, "0000000b-4", state.generation))
    assert not any(state.is_at_least(each) for each in ("0000000b-6", "0000000d-0", f"{state.epoch}-2"))
    assert state.next_generation(None, ()).continues == state.continues
    assert LiveState.model_validate_json(state.model_dump_json()) == state


def test_a_state_remembers_a_bounded_number_of_epochs() -> None:
    state = initial_state()
    first = state.generation
    for _ in range(20):
        state = new_epoch([state], None, ())
    assert len(state.continues) == 16
    assert not state.is_at_least(first)
