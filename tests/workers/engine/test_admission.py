"""Admission on a real Redis: which erasures a request gets, and when plans are reused."""

import asyncio
import uuid
from collections.abc import Sequence
from unittest.mock import AsyncMock

import pytest
import redis

from range_store.domain.erasure import Damp, Erasure
from range_store.domain.live import LiveErasure
from range_store.domain.plan import NO_ERASURE
from range_store.errors import GenerationNotReached, InvalidErasure, NoRangeSet, StoreUnavailable, UnknownConcept
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.range_store.builders import FINGERPRINT, random_range_set
from workers.engine.admission import Admission, Planner

FIRST, SECOND = random_range_set(800), random_range_set(801)


@pytest.fixture
def store(redis_client: redis.Redis) -> RangeStore:
    return RangeStore(redis_client, f"news-{uuid.uuid4().hex}")


@pytest.fixture
def active(store: RangeStore) -> RangeStore:
    store.activate(store.range_sets.publish(*FIRST))
    return store


def planner_of(store: RangeStore, capacity: int = 1 << 20) -> Planner:
    """A planner whose mirror has read the store once and reads again only when a request asks for a generation."""
    mirror = Mirror(store, FINGERPRINT)
    mirror.refresh()
    return Planner(mirror, capacity)


def admit(
    planner: Planner, erase: Sequence[Erasure] | None, min_generation: str | None = None, timeout: float | None = None
) -> Admission:
    return asyncio.run(planner.admit(erase, min_generation, timeout))


def live(concept: str, enforced: bool = False, expires_at: float | None = None, tau: float = 2.5) -> LiveErasure:
    erasure = Erasure(concept=concept, tau=tau)
    return LiveErasure(erasure=erasure, enforced=enforced, expires_at=expires_at)


def planned(admitted: Admission) -> list[tuple[str, float]]:
    """Concept and tau of the plan's erasures, in order."""
    return [(erasure.concept, erasure.tau) for erasure in admitted.plan.erasures]


def test_request_without_erasures_gets_the_empty_plan(active: RangeStore) -> None:
    state = active.live_state()
    for erase in (None, []):
        admitted = admit(planner_of(active), erase)
        assert admitted.plan is NO_ERASURE
        assert (admitted.source, admitted.enforced) == ("none", frozenset())
        assert (admitted.range_set, admitted.generation) == (FIRST[0].id, state.generation)


def test_request_that_names_no_erasures_gets_the_live_ones(active: RangeStore) -> None:
    state = active.set_erasures([live("World", tau=1.0), live("Business", enforced=True, tau=2.0)])
    admitted = admit(planner_of(active), None)
    assert planned(admitted) == [("Business", 2.0), ("World", 1.0)]
    assert (admitted.source, admitted.enforced) == ("live", {"Business"})
    assert (admitted.range_set, admitted.generation) == (FIRST[0].id, state.generation)


def test_request_replaces_the_live_erasures_that_are_not_enforced(active: RangeStore) -> None:
    active.set_erasures([live("World")])
    planner = planner_of(active)
    admitted = admit(planner, [Erasure(concept="Sports", tau=3.0)])
    assert planned(admitted) == [("Sports", 3.0)]
    assert (admitted.source, admitted.enforced) == ("request", frozenset())
    assert admit(planner, []).source == "none"


def test_enforced_erasures_precede_and_override_those_of_the_request(active: RangeStore) -> None:
    active.set_erasures([live("World", enforced=True, tau=1.0), live("Sci/Tech", enforced=True), live("Sports")])
    requested = [Erasure(concept="Business", tau=4.0), Erasure(concept="World", replacement=Damp(damp=1.0))]
    planner = planner_of(active)
    admitted = admit(planner, requested)
    assert planned(admitted) == [("Sci/Tech", 2.5), ("World", 1.0), ("Business", 4.0)]
    assert admitted.plan.erasures[1].replacement == "zero"
    assert (admitted.source, admitted.enforced) == ("request", {"World", "Sci/Tech"})
    refused = admit(planner, [])
    assert planned(refused) == [("Sci/Tech", 2.5), ("World", 1.0)], "an empty request does not switch them off"
    assert refused.source == "live"


@pytest.mark.parametrize(("now", "expected"), [(99.0, ["Sports", "World"]), (100.0, ["World"]), (101.0, ["World"])])
def test_expired_erasures_do_not_apply(
    active: RangeStore, monkeypatch: pytest.MonkeyPatch, now: float, expected: list[str]
) -> None:
    raw, state = active._read()
    assert state is not None
    after = state.next_generation(state.range_set, (live("Sports", enforced=True, expires_at=100.0), live("World")))
    assert active._write(raw, after, [])
    planner = planner_of(active)
    monkeypatch.setattr(active.clock, "now", lambda: now)
    admitted = admit(planner, None)
    assert [concept for concept, _ in planned(admitted)] == expected
    assert ("Sports" in admitted.enforced) == ("Sports" in expected)


def test_admission_before_the_first_read_is_refused(active: RangeStore) -> None:
    planner = Planner(Mirror(active, FINGERPRINT), 1 << 20)
    for erase in (None, [], [Erasure(concept="World")]):
        with pytest.raises(StoreUnavailable) as caught:
            admit(planner, erase)
        assert str(caught.value) == "the live erasures were never read: the store cannot be reached"


def test_erasing_without_a_range_set_is_refused(store: RangeStore) -> None:
    planner = planner_of(store)
    admitted = admit(planner, None)
    assert (admitted.plan, admitted.range_set) == (NO_ERASURE, None)
    with pytest.raises(NoRangeSet) as caught:
        admit(planner, [Erasure(concept="World")])
    assert str(caught.value) == "no range set is active: fit one with `neuronlens fit … --activate`"


def test_unresolvable_request_is_refused(active: RangeStore) -> None:
    planner = planner_of(active)
    with pytest.raises(UnknownConcept, match="Weather"):
        admit(planner, [Erasure(concept="Weather")])
    with pytest.raises(InvalidErasure, match="'World' is named twice"):
        admit(planner, [Erasure(concept="World"), Erasure(concept="World", tau=1.0)])


def test_plan_of_the_same_erasures_is_reused(active: RangeStore) -> None:
    planner = planner_of(active)
    one, other = [Erasure(concept="World")], [Erasure(concept="World", tau=1.0)]
    first = admit(planner, one).plan
    assert admit(planner, [Erasure(concept="World")]).plan is first
    assert admit(planner, other).plan is not first
    assert admit(planner, []).plan is admit(planner, None).plan


def test_least_recently_used_plan_is_dropped(active: RangeStore) -> None:
    world, sports, business = ([Erasure(concept=concept)] for concept in ("World", "Sports", "Business"))
    size = admit(planner_of(active), world).plan.nbytes
    assert size == 17 * FIRST[0].provenance.model.hidden_size
    planner = planner_of(active, capacity=2 * size)
    of_world, of_sports = admit(planner, world).plan, admit(planner, sports).plan
    assert admit(planner, world).plan is of_world, "used again, so it stays"
    of_business = admit(planner, business).plan
    assert len(planner._plans) == 2
    assert admit(planner, world).plan is of_world
    assert admit(planner, business).plan is of_business
    again = admit(planner, sports).plan
    assert again is not of_sports
    assert again.key == of_sports.key


def test_plan_larger_than_the_cache_is_used_and_not_kept(active: RangeStore) -> None:
    world, both = [Erasure(concept="World")], [Erasure(concept="World"), Erasure(concept="Sports")]
    size = admit(planner_of(active), world).plan.nbytes
    planner = planner_of(active, capacity=size)
    of_world = admit(planner, world).plan
    assert admit(planner, world).plan is of_world
    assert planned(admit(planner, both)) == [("World", 2.5), ("Sports", 2.5)]
    assert (len(planner._plans), planner._bytes) == (0, 0)
    again = admit(planner, world).plan
    assert admit(planner, world).plan is again


def test_plan_that_two_requests_made_at_once_is_counted_once(active: RangeStore) -> None:
    planner = planner_of(active)

    async def both() -> None:
        await asyncio.gather(*(planner.admit([Erasure(concept="World")]) for _ in range(2)))

    asyncio.run(both())
    (kept,) = planner._plans.values()
    assert planner._bytes == kept.nbytes


def test_another_range_set_makes_another_plan(active: RangeStore) -> None:
    mirror = Mirror(active, FINGERPRINT)
    mirror.refresh()
    planner = Planner(mirror, 1 << 20)
    before = admit(planner, [Erasure(concept="World")])
    active.activate(active.range_sets.publish(*SECOND))
    mirror.refresh()
    after = admit(planner, [Erasure(concept="World")])
    assert (before.range_set, after.range_set) == (FIRST[0].id, SECOND[0].id)
    assert before.plan.key != after.plan.key


def test_request_waits_for_the_generation_that_it_asks_for(active: RangeStore) -> None:
    planner = planner_of(active)
    state = active.set_erasure(live("World"))
    assert planned(admit(planner, None)) == [], "the mirror has not read the change yet"
    for erase, concepts in ((None, ["World"]), ([Erasure(concept="Sports")], ["Sports"])):
        admitted = admit(planner, erase, state.generation)
        assert ([concept for concept, _ in planned(admitted)], admitted.generation) == (concepts, state.generation)


def test_request_for_a_future_generation_is_refused(active: RangeStore) -> None:
    state = active.live_state()
    future = state.next_generation(None, ()).generation
    with pytest.raises(GenerationNotReached) as caught:
        admit(planner_of(active), None, future, timeout=0.0)
    assert (caught.value.wanted, caught.value.held) == (future, state.generation)


def test_waiting_is_bounded_by_the_time_of_the_request(active: RangeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = planner_of(active)
    reach = AsyncMock()
    monkeypatch.setattr(planner._generation_wait, "reach", reach)
    admit(planner, None, "0123abcd-7", timeout=1.5)
    reach.assert_awaited_once_with("0123abcd-7", 1.5)
