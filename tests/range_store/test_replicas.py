"""The roster of replicas: it shows which of them do not follow a change yet, and forgets those that have ended."""

import json
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure, LiveState, is_at_least
from range_store.errors import StoreUnavailable
from range_store.storage import heartbeat
from range_store.storage import replicas as roster_module
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import (
    LEASE_SECONDS,
    SILENT_SECONDS,
    ReplicaRegistry,
    ReplicaStatus,
    ReplicaWait,
    Roster,
    new_replica_name,
)
from range_store.storage.store import RangeStore
from tests.range_store.builders import FINGERPRINT, random_range_set
from tests.range_store.waiting import until

NEVER = 3600.0
NAMES = ("a:1:x", "a:2:x", "b:1:Zoë", "since:1:x")
EPOCHS = ("00000000", "0000000a")
Mirrors = Callable[..., Mirror]

generations = st.builds(lambda epoch, counter: f"{epoch}-{counter}", st.sampled_from(EPOCHS), st.integers(0, 12))


@pytest.fixture
def replicas(store: RangeStore) -> ReplicaRegistry:
    return ReplicaRegistry(store.client, store.model)


@pytest.fixture
def mirrors(store: RangeStore) -> Iterator[Mirrors]:
    """`mirrors()`: a replica that learns of changes by messages only."""
    made: list[Mirror] = []

    def make(**options: object) -> Mirror:
        made.append(Mirror(store, FINGERPRINT, **({"poll": NEVER, "replica": new_replica_name()} | options)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for mirror in made:
        mirror.close()


@pytest.fixture
def active(store: RangeStore) -> RangeStore:
    """A store whose range set is active."""
    store.activate(store.range_sets.publish(*random_range_set(600)))
    return store


def toggle(store: RangeStore) -> LiveState:
    return store.set_erasure(LiveErasure(erasure=Erasure(concept="World")))


def names(roster: Roster) -> list[str]:
    return [each.name for each in roster.replicas]


def name_of(mirror: Mirror) -> str:
    assert mirror.heartbeat is not None
    return mirror.heartbeat.name


def report(mirror: Mirror) -> None:
    assert mirror.heartbeat is not None
    mirror.heartbeat.read_and_report()


@given(generations, generations)
def test_later_generation_of_an_epoch_reaches_the_earlier_ones(one: str, other: str) -> None:
    (epoch, counter), (other_epoch, other_counter) = one.split("-"), other.split("-")
    assert is_at_least(one, other) == (epoch == other_epoch and int(counter) >= int(other_counter))
    if epoch != other_epoch:
        assert not is_at_least(other, one)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.none() | generations, st.booleans()), max_size=20),
    st.none() | generations,
)
def test_roster_holds_the_last_report_of_each_replica(
    replicas: ReplicaRegistry, store: RangeStore, reports: list[tuple[str, str | None, bool]], wanted: str | None
) -> None:
    store.client.delete(store.keys.replicas)
    expected: dict[str, str | None] = {}
    for name, generation, removed in reports:
        if removed:
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
        behind = {name for name, at in expected.items() if at is None or not is_at_least(at, wanted)}
        assert set(roster.missing(wanted)) == behind
    reported = any(not removed for *_, removed in reports)
    assert (roster.since is not None) == reported, "an empty roster differs from one that never was"


def test_report_reads_the_whole_roster_rarely_in_a_large_fleet(
    replicas: ReplicaRegistry, store: RangeStore, redis_client: redis.Redis
) -> None:
    for n in range(320):
        replicas.report(f"ended-{n}", None, None, 0.001)
    until(lambda: not replicas.read().replicas)

    def scans() -> int:
        stats: dict[str, dict[str, int]] = redis_client.info("commandstats")  # type: ignore[assignment]
        return stats["cmdstat_hgetall"]["calls"]

    for n in range(640):
        replicas.report(f"alive-{n}", None, None, 600.0)
    before = scans()
    for n in range(640):
        replicas.report(f"alive-{n}", None, None, 600.0)
    assert scans() - before < 200, "about one report in ten sweeps"
    until(lambda: replicas.report("alive-0", None, None, 600.0) == 640)
    assert store.client.hlen(store.keys.replicas) == 641, "expired reports are swept all the same"


def test_expired_report_is_ignored_and_swept_by_the_next_report(replicas: ReplicaRegistry, store: RangeStore) -> None:
    replicas.report("killed:1:x", "00000000-1", None)
    assert names(replicas.read()) == ["killed:1:x"]
    replicas.report("killed:1:x", "00000000-1", None, seconds=0.001)
    until(lambda: not replicas.read().replicas)
    store.client.hset(store.keys.replicas, "garbage", "{]")
    assert replicas.read().replicas == ()
    assert replicas.report("lives:1:x", "00000000-1", None) == 1
    assert set(store.client.hkeys(store.keys.replicas)) == {b"since", b"lives:1:x"}


@pytest.mark.parametrize(
    "wrong",
    ["", "10.0.0.1", ":8002", "10.0.0.1:8002/x", "http://10.0.0.1:8002", "a b:1", "10.0.0.1:8002\n", "[::1:1", 7],
)
def test_invalid_metrics_address_is_left_out_of_a_report(
    replicas: ReplicaRegistry, store: RangeStore, wrong: object
) -> None:
    for address in ("10.0.0.1:8002", "[fe80::1]:8002", "node-3.example:1"):
        replicas.report("there:1:x", "00000000-1", None, metrics=address)
        assert [(each.host, each.metrics) for each in replicas.read().replicas] == [("there", address)]
    replicas.report("there:1:x", "00000000-1", None)
    assert [each.metrics for each in replicas.read().replicas] == [None]
    report = {"generation": None, "range_set": None, "at": 0, "expires": 1e12, "metrics": wrong}
    store.client.hset(store.keys.replicas, "there:1:x", json.dumps(report))
    assert [(each.name, each.metrics) for each in replicas.read().replicas] == [("there:1:x", None)]


def test_replicas_report_a_change_without_waiting_for_their_heartbeat(
    active: RangeStore, replicas: ReplicaRegistry, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", NEVER)
    some, reader = [mirrors() for _ in range(3)], mirrors(replica=None)
    for mirror in (*some, reader):
        mirror.start()
    for _ in range(3):
        state = toggle(active)
        until(lambda state=state: not replicas.read().missing(state.generation))
        assert names(replicas.read()) == sorted(map(name_of, some))
        assert all(mirror.snapshot and mirror.snapshot.live == state for mirror in some), "what is reported is in force"
    (first, *_) = replicas.read().replicas
    assert first.range_set == state.range_set
    assert first.expires - first.at == pytest.approx(LEASE_SECONDS, abs=0.01)
    until(lambda: all(mirror.heartbeat and mirror.heartbeat.live_replicas == 3 for mirror in some))


def test_replica_that_has_not_read_a_change_is_missing(
    active: RangeStore, replicas: ReplicaRegistry, mirrors: Mirrors
) -> None:
    stale = mirrors()
    stale.refresh()  # and never again by itself, as it was not started
    report(stale)
    before = toggle(active)
    assert replicas.read().missing(before.generation) == (name_of(stale),)
    stale.refresh()
    report(stale)
    assert replicas.read().missing(before.generation) == ()
    later = before.next_generation(before.range_set, ())
    assert replicas.read().missing(later.generation) == (name_of(stale),)


def test_report_is_renewed_and_created_again_after_a_loss(
    active: RangeStore, replicas: ReplicaRegistry, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
    mirror = mirrors()
    mirror.start()
    (first,) = replicas.read().replicas
    until(lambda: replicas.read().replicas[0].at > first.at)
    active.client.delete(active.keys.replicas)
    until(lambda: names(replicas.read()) == [name_of(mirror)])
    since = replicas.read().since
    assert since is not None
    assert since > first.at


def test_ended_replica_is_forgotten_only_after_it_missed_a_heartbeat(
    replicas: ReplicaRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, ended = new_replica_name("other"), new_replica_name("ended")
    for name in (other, ended):
        replicas.report(name, None, None, NEVER)
    monkeypatch.setattr(roster_module, "HEARTBEAT_SECONDS", NEVER)
    assert not replicas.forget("ended")
    assert names(replicas.read()) == sorted([other, ended])
    monkeypatch.setattr(roster_module, "HEARTBEAT_SECONDS", 0.0)
    until(lambda: replicas.forget("ended"))
    assert replicas.forget("unknown")
    assert names(replicas.read()) == [other]


def test_mirror_follows_while_its_reports_fail(
    active: RangeStore,
    replicas: ReplicaRegistry,
    mirrors: Mirrors,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.02)
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


def roster(now: float, since: float | None, **generations: str | None) -> Roster:
    reports = [
        ReplicaStatus(name=name, generation=generation, range_set=None, at=now, expires=now + 1)
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
        pytest.param([roster(SETTLED, 100, a=WANTED, b="0000000b-9")], False, ("b",), id="one has another epoch"),
        pytest.param([roster(SETTLED, 100, a=WANTED, b=None)], False, ("b",), id="one has read nothing"),
        pytest.param([roster(SETTLED, 100, b=WANTED)], False, ("a",), id="this one does not report"),
        pytest.param([roster(101, 100, a=WANTED)], False, (), id="others may be missing from a new roster"),
        pytest.param([roster(100, None, a=WANTED)], False, (), id="no roster"),
        pytest.param(
            [roster(100, None, a=WANTED), roster(SETTLED, None, a=WANTED)], True, (), id="no roster begins in time"
        ),
        pytest.param(
            [roster(90, None, a=WANTED), roster(SETTLED, 101, a=WANTED)], False, (), id="a roster begins late"
        ),
    ],
)
def test_follow_waits_for_every_replica_that_can_be_alive(
    looks: list[Roster], done: bool, missing: tuple[str, ...]
) -> None:
    follow = ReplicaWait(WANTED, lambda: "a")
    assert [follow.done(look) for look in looks][-1] == done
    assert follow.missing == missing
    if not done:
        assert all(name in follow.why() for name in missing)


def test_empty_roster_counts_as_all_once_it_has_settled() -> None:
    assert ReplicaWait(WANTED).done(roster(SETTLED, 100))
    assert not ReplicaWait(WANTED).done(roster(101, 100))
    assert not ReplicaWait(WANTED, lambda: "a").done(roster(SETTLED, 100)), "the replica that asks is alive"


def test_stored_report_is_documented_json(active: RangeStore, mirrors: Mirrors, redis_client: redis.Redis) -> None:
    mirror = mirrors()
    mirror.refresh()
    report(mirror)
    stored = redis_client.hgetall(active.keys.replicas)
    held = json.loads(stored[name_of(mirror).encode()])
    assert held.keys() == {"generation", "range_set", "at", "expires"}
    assert held["generation"] == active.live_state().generation
    assert float(stored[b"since"]) <= held["at"] <= time.time() + 1


def test_roster_names_the_dtypes_that_the_model_is_served_in(replicas: ReplicaRegistry, store: RangeStore) -> None:
    assert replicas.read().dtypes == ()
    for name, dtype in (("a:1:x", "float32"), ("b:1:x", "bfloat16"), ("c:1:x", "float32"), ("d:1:x", None)):
        replicas.report(name, None, None, dtype=dtype)
    assert replicas.read().dtypes == ("bfloat16", "float32")
    report = {"generation": None, "range_set": None, "at": 0, "expires": 1e12, "dtype": 7}
    store.client.hset(store.keys.replicas, "b:1:x", json.dumps(report))
    assert replicas.read().dtypes == ("float32",)
    assert [each.name for each in replicas.read().replicas] == ["a:1:x", "b:1:x", "c:1:x", "d:1:x"]


def test_reporter_reports_the_dtype(store: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    mirror.heartbeat.dtype = "float16"  # type: ignore[union-attr]
    mirror.heartbeat.read_and_report()  # type: ignore[union-attr]
    assert store.replicas.read().dtypes == ("float16",)
