"""What replicas report: who changes the live state can tell who does not follow yet, and nobody is named for ever."""

import json
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from range_store import reporter
from range_store.erasure import Erasure
from range_store.errors import ForeignRangeSet, StoreUnavailable
from range_store.live import LiveErasure, LiveState, reaches
from range_store.mirror import Mirror
from range_store.replicas import (
    HEARTBEAT_SECONDS,
    LEASE_SECONDS,
    SILENT_SECONDS,
    Follow,
    Replica,
    Replicas,
    Roster,
    new_name,
)
from range_store.store import RangeStore
from tests.range_store.builders import FINGERPRINT, random_range_set
from tests.range_store.waiting import until

NEVER = 3600.0
NAMES = ("a:1:x", "a:2:x", "b:1:Zoë", "since:1:x")
EPOCHS = ("00000000", "0000000a")
Mirrors = Callable[..., Mirror]

generations = st.builds(lambda epoch, counter: f"{epoch}-{counter}", st.sampled_from(EPOCHS), st.integers(0, 12))


@pytest.fixture
def replicas(store: RangeStore) -> Replicas:
    return Replicas(store.client, store.model)


@pytest.fixture
def mirrors(store: RangeStore) -> Iterator[Mirrors]:
    """`mirrors()`: a replica that hears of changes by message alone."""
    made: list[Mirror] = []

    def make(fingerprint: str = FINGERPRINT, **options: object) -> Mirror:
        named = {"poll": NEVER, "replica": new_name()} | options
        made.append(Mirror(store, fingerprint, **named))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for mirror in made:
        mirror.close()


@pytest.fixture
def active(store: RangeStore) -> RangeStore:
    store.activate(store.publish(*random_range_set(600)))
    return store


def toggle(store: RangeStore) -> LiveState:
    return store.set_erasure(LiveErasure(erasure=Erasure(concept="World")))


def names(roster: Roster) -> list[str]:
    return [each.name for each in roster.replicas]


def name_of(mirror: Mirror) -> str:
    assert mirror.reporter is not None
    return mirror.reporter.name


def told(mirror: Mirror) -> None:
    assert mirror.reporter is not None
    mirror.reporter.report()


@given(generations, generations)
def test_of_one_epoch_the_later_generation_reaches_the_earlier(one: str, other: str) -> None:
    (epoch, counter), (other_epoch, other_counter) = one.split("-"), other.split("-")
    assert reaches(one, other) == (epoch == other_epoch and int(counter) >= int(other_counter))
    if epoch != other_epoch:
        assert not reaches(other, one)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.none() | generations, st.booleans()), max_size=20),
    st.none() | generations,
)
def test_the_roster_is_everyones_last_word(
    replicas: Replicas, store: RangeStore, told: list[tuple[str, str | None, bool]], wanted: str | None
) -> None:
    store.client.delete(store.keys.replicas)
    expected: dict[str, str | None] = {}
    for name, generation, goes in told:
        if goes:
            replicas.remove(name)
            expected.pop(name, None)
        else:
            expected[name] = generation
            assert replicas.report(name, generation, "some-set") == len(expected)
    roster = replicas.read()
    assert {each.name: each.generation for each in roster.replicas} == expected
    assert names(roster) == sorted(expected)
    assert all(each.at - 1e-3 <= roster.now < each.expires for each in roster.replicas)
    if wanted is not None:
        behind = {name for name, at in expected.items() if at is None or not reaches(at, wanted)}
        assert set(roster.missing(wanted)) == behind
    reported = any(not goes for *_, goes in told)
    assert (roster.since is not None) == reported, "that the last one went is not that there never was one"


def test_in_a_large_fleet_a_report_costs_no_more_and_what_expired_goes_all_the_same(
    replicas: Replicas, store: RangeStore, redis_client: redis.Redis
) -> None:
    for n in range(640):
        replicas.report(f"gone-{n}", None, None, 0.001)
    time.sleep(0.01)

    def looks() -> int:
        told: dict[str, dict[str, int]] = redis_client.info("commandstats")  # type: ignore[assignment]
        return told["cmdstat_hgetall"]["calls"]

    for n in range(640):
        replicas.report(f"here-{n}", None, None, 600.0)
    before = looks()
    for n in range(640):
        replicas.report(f"here-{n}", None, None, 600.0)
    assert looks() - before < 200, "one in ten looks at all of them"
    until(lambda: replicas.report("here-0", None, None, 600.0) == 640)
    assert len(replicas.read().replicas) == 640


def test_who_stops_reporting_is_forgotten_and_swept_out_by_the_next(replicas: Replicas, store: RangeStore) -> None:
    replicas.report("killed:1:x", "00000000-1", None)
    assert names(replicas.read()) == ["killed:1:x"]
    replicas.report("killed:1:x", "00000000-1", None, seconds=0.05)
    until(lambda: not replicas.read().replicas)
    store.client.hset(store.keys.replicas, "garbage", "{]")
    assert replicas.read().replicas == ()
    assert replicas.report("lives:1:x", "00000000-1", None) == 1
    assert set(store.client.hkeys(store.keys.replicas)) == {b"since", b"lives:1:x"}


@pytest.mark.parametrize(
    "wrong",
    ["", "10.0.0.1", ":8002", "10.0.0.1:8002/x", "http://10.0.0.1:8002", "a b:1", "10.0.0.1:8002\n", "[::1:1", 7],
)
def test_where_metrics_are_is_told_and_what_is_no_address_costs_no_replica(
    replicas: Replicas, store: RangeStore, wrong: object
) -> None:
    for address in ("10.0.0.1:8002", "[fe80::1]:8002", "node-3.example:1"):
        replicas.report("there:1:x", "00000000-1", None, metrics=address)
        assert [(each.host, each.metrics) for each in replicas.read().replicas] == [("there", address)]
    replicas.report("there:1:x", "00000000-1", None)
    assert [each.metrics for each in replicas.read().replicas] == [None]
    report = {"generation": None, "range_set": None, "at": 0, "expires": 1e12, "metrics": wrong}
    store.client.hset(store.keys.replicas, "there:1:x", json.dumps(report))
    assert [(each.name, each.metrics) for each in replicas.read().replicas] == [("there:1:x", None)]


def test_every_replica_reports_a_change_at_once(active: RangeStore, replicas: Replicas, mirrors: Mirrors) -> None:
    some, reader = [mirrors() for _ in range(3)], mirrors(replica=None)
    for mirror in (*some, reader):
        mirror.start()
    for _ in range(3):
        state = toggle(active)
        until(lambda state=state: not replicas.read().missing(state.generation))
        assert names(replicas.read()) == sorted(map(name_of, some))
        assert all(mirror.snapshot and mirror.snapshot.live == state for mirror in some), "reported is in force"
    (report, *_) = replicas.read().replicas
    assert report.range_set == state.range_set
    assert report.expires - report.at == pytest.approx(LEASE_SECONDS, abs=0.01)
    until(lambda: all(mirror.reporter and mirror.reporter.live == 3 for mirror in some))


def test_a_replica_that_has_not_read_a_change_is_missing(
    active: RangeStore, replicas: Replicas, mirrors: Mirrors
) -> None:
    deaf = mirrors()
    deaf.refresh()  # and never again by itself: it was not started
    told(deaf)
    before = toggle(active)
    assert replicas.read().missing(before.generation) == (name_of(deaf),)
    deaf.refresh()
    told(deaf)
    assert replicas.read().missing(before.generation) == ()
    later = before.advanced(before.range_set, ())
    assert replicas.read().missing(later.generation) == (name_of(deaf),)


def test_a_replica_is_known_before_it_has_read_anything(
    active: RangeStore, replicas: Replicas, mirrors: Mirrors
) -> None:
    mirror = mirrors(fingerprint="cd" * 32)
    with pytest.raises(ForeignRangeSet):
        mirror.refresh()
    (report,) = replicas.read().replicas
    assert (report.name, report.generation) == (name_of(mirror), None)
    assert replicas.read().missing(active.live().generation) == (name_of(mirror),)


@pytest.mark.parametrize("started", [True, False])
def test_who_closes_is_out_at_once(active: RangeStore, replicas: Replicas, mirrors: Mirrors, started: bool) -> None:
    mirror = mirrors()
    if started:
        mirror.start()
    else:
        mirror.refresh()
    assert names(replicas.read()) == [name_of(mirror)]
    mirror.close()
    assert replicas.read().replicas == ()
    assert replicas.read().since is not None


def test_who_withdraws_holds_nobody_up_and_goes_on_reading(
    active: RangeStore, replicas: Replicas, mirrors: Mirrors
) -> None:
    mirror = mirrors()
    mirror.start()
    mirror.withdraw()
    until(lambda: not replicas.read().replicas)
    state = toggle(active)
    until(lambda: mirror.snapshot.live == state)
    told(mirror)
    assert replicas.read().replicas == ()


def test_a_report_is_renewed_and_made_anew_after_it_was_lost(
    active: RangeStore, replicas: Replicas, mirrors: Mirrors
) -> None:
    mirror = mirrors()
    mirror.start()
    (first,) = replicas.read().replicas
    until(lambda: replicas.read().replicas[0].at > first.at + HEARTBEAT_SECONDS / 2)
    active.client.delete(active.keys.replicas)
    until(lambda: names(replicas.read()) == [name_of(mirror)])
    since = replicas.read().since
    assert since is not None
    assert since > first.at


def test_who_is_known_to_have_ended_is_forgotten_and_who_lives_is_not(replicas: Replicas) -> None:
    lives, ended = new_name("lives"), new_name("ended")
    until(lambda: replicas.report(ended, None, None, NEVER) and not replicas.forget("ended"))  # it reported just now
    until(lambda: replicas.forget("ended"))
    until(lambda: replicas.report(lives, None, None, NEVER) and not replicas.forget("lives"))
    assert replicas.forget("never")
    assert names(replicas.read()) == [lives]


def test_a_report_that_fails_does_not_harm_the_mirror(
    active: RangeStore, replicas: Replicas, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.client.set(active.keys.replicas, "another application's")
    mirror = mirrors()
    mirror.start()
    state = toggle(active)
    until(lambda: mirror.snapshot.live == state)
    assert (mirror.problem, mirror.store_up, mirror.lapsed) == (None, True, False)
    until(lambda: "cannot report" in caplog.text)
    with pytest.raises(StoreUnavailable, match="another application"):
        replicas.read()
    active.client.delete(active.keys.replicas)
    until(lambda: names(replicas.read()) == [name_of(mirror)])
    assert caplog.text.count("cannot report") == 1


def test_who_was_silent_must_read_before_it_admits(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that others may have given up, for it was stopped, knows that of itself."""
    mirror, reader = mirrors(), mirrors(replica=None)
    monkeypatch.setattr(reporter, "SILENT_SECONDS", NEVER)
    for each in (mirror, reader):
        each.refresh()
    assert not mirror.lapsed
    monkeypatch.setattr(reporter, "SILENT_SECONDS", 0.02)
    until(lambda: mirror.lapsed)
    assert not reader.lapsed
    state = toggle(active)
    monkeypatch.setattr(reporter, "SILENT_SECONDS", NEVER)
    assert mirror.catch_up().live == state
    assert not mirror.lapsed


def test_who_was_silent_reads_before_it_reports(
    active: RangeStore, replicas: Replicas, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a report of what it held before would make it one that nobody had given up."""
    mirror = mirrors()
    mirror.refresh()
    monkeypatch.setattr(reporter, "SILENT_SECONDS", 0.02)
    until(lambda: mirror.lapsed)
    state = toggle(active)
    told(mirror)
    assert mirror.snapshot is not None
    assert mirror.snapshot.live == state
    assert replicas.read().missing(state.generation) == ()


def roster(now: float, since: float | None, **generations: str | None) -> Roster:
    reports = [
        Replica(name=name, generation=generation, range_set=None, at=now, expires=now + 1)
        for name, generation in sorted(generations.items())
    ]
    return Roster(now, since, tuple(reports))


SETTLED = 100 + SILENT_SECONDS
WANTED = "0000000a-5"


@pytest.mark.parametrize(
    ("looks", "done", "missing"),
    [
        pytest.param([roster(SETTLED, 100, a=WANTED, b="0000000a-6")], True, (), id="all follow"),
        pytest.param([roster(SETTLED, 100, a=WANTED, b="0000000a-4")], False, ("b",), id="one is behind"),
        pytest.param([roster(SETTLED, 100, a=WANTED, b="0000000b-9")], False, ("b",), id="one is of another epoch"),
        pytest.param([roster(SETTLED, 100, a=WANTED, b=None)], False, ("b",), id="one has read nothing"),
        pytest.param([roster(SETTLED, 100, b=WANTED)], False, ("a",), id="this one does not report"),
        pytest.param([roster(101, 100, a=WANTED)], False, (), id="others may not have come back to a new roster"),
        pytest.param([roster(100, None, a=WANTED)], False, (), id="there is no roster"),
        pytest.param(
            [roster(100, None, a=WANTED), roster(SETTLED, None, a=WANTED)], True, (), id="nobody begins one in time"
        ),
        pytest.param(
            [roster(90, None, a=WANTED), roster(SETTLED, 101, a=WANTED)], False, (), id="somebody begins one late"
        ),
    ],
)
def test_all_is_everybody_who_can_be_alive(looks: list[Roster], done: bool, missing: tuple[str, ...]) -> None:
    follow = Follow(WANTED, lambda: "a")
    assert [follow.done(look) for look in looks][-1] == done
    assert follow.missing == missing
    if not done:
        assert all(name in follow.why() for name in missing)


def test_nobody_is_all_once_it_is_certain() -> None:
    assert Follow(WANTED).done(roster(SETTLED, 100))
    assert not Follow(WANTED).done(roster(101, 100))
    assert not Follow(WANTED, lambda: "a").done(roster(SETTLED, 100)), "who asks is alive"


def test_what_is_stored_is_documented_json(active: RangeStore, mirrors: Mirrors, redis_client: redis.Redis) -> None:
    mirror = mirrors()
    mirror.refresh()
    told(mirror)
    stored = redis_client.hgetall(active.keys.replicas)
    report = json.loads(stored[name_of(mirror).encode()])
    assert report.keys() == {"generation", "range_set", "at", "expires"}
    assert report["generation"] == active.live().generation
    assert float(stored[b"since"]) <= report["at"] <= time.time() + 1
