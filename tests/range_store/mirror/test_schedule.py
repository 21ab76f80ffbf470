"""When a mirror reads, sweeps and reconnects, by a clock that the test controls."""

import logging

import pytest
import redis

from range_store.domain.live import LiveState
from range_store.errors import InvalidRangeSet, LiveStateLost, StoreUnavailable
from range_store.storage import mirror as mirror_module
from range_store.storage.mirror import FIRST_BACKOFF, LAST_BACKOFF, Mirror
from range_store.storage.schema import CHANGES
from range_store.storage.store import RangeStore
from tests.range_store.mirror.controlled import (
    NEVER,
    WALL,
    Clock,
    Mirrors,
    Stopping,
    concepts,
    empty,
    erasing,
    fields,
    listen,
    logged,
)

LISTEN, SWEEP = 0.25, 0.5
"""Stand-ins for the mirror's constants: their sums are exact in binary arithmetic."""


@pytest.fixture(autouse=True)
def _exact_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "LISTEN_SECONDS", LISTEN)
    monkeypatch.setattr(mirror_module, "SWEEP_SECONDS", SWEEP)


def reading(mirrors: Mirrors, clock: Clock, poll: float) -> tuple[Mirror, list[float]]:
    """A mirror, and the times at which it reads."""
    times: list[float] = []
    return mirrors(poll=poll, on_read=lambda: times.append(clock.now)), times


def test_mirror_reads_when_it_has_subscribed_and_at_every_poll(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, reads = reading(mirrors, clock, poll=0.625)
    feed = listen(mirror, clock, [None] * 6, monkeypatch)
    assert reads == [0.0, 0.0, 0.625, 1.25], "the subscription's own message makes it read again"
    assert feed.waits == [0.25, 0.25, 0.25, 0.125, 0.25, 0.25, 0.125, 0.25]
    assert feed.closed
    assert mirror.snapshot is not None
    assert mirror.snapshot.read_at == 1.25


def test_short_poll_shortens_the_wait(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, reads = reading(mirrors, clock, poll=0.125)
    feed = listen(mirror, clock, [None] * 3, monkeypatch)
    assert feed.waits == [0.125] * 5
    assert reads == [0.0, 0.0, 0.125, 0.25, 0.375]


def test_mirror_polls_every_two_seconds_by_default(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[float] = []
    listen(mirrors(on_read=lambda: reads.append(clock.now)), clock, [None] * 16, monkeypatch)
    assert reads == [0.0, 0.0, 2.0, 4.0]


def test_message_makes_the_mirror_read_at_once(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror, reads = reading(mirrors, clock, poll=NEVER)
    seen: list[list[str]] = []

    def change() -> None:
        seen.append(concepts(mirror.snapshot))
        active.set_erasure(erasing("World"))

    def other_model() -> None:
        seen.append(concepts(mirror.snapshot))
        active.client.publish(CHANGES, b'{"model": "another"}')

    feed = listen(mirror, clock, [None, change, other_model, None], monkeypatch)
    assert seen == [[], ["World"]]
    assert reads == [0.0, 0.0, 0.25], "a message about another model costs no read"
    assert feed.drains == [0.0, 0.0, 0.0], "further messages are taken without waiting"


def test_listening_ends_its_subscription(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = listen(mirrors(poll=NEVER), clock, [], monkeypatch)
    assert feed.closed
    assert not feed._feed.subscribed


@pytest.mark.parametrize(
    ("kind", "data", "concerns"),
    [
        pytest.param("subscribe", 1, True, id="subscribed"),
        pytest.param("unsubscribe", 0, False, id="unsubscribed"),
        pytest.param("message", b'{"model": "another"}', False, id="another model"),
        pytest.param("message", b'{"model": 1}', False, id="a number as the model"),
        pytest.param("message", '{"model": "Zoë"}'.encode(), False, id="another model beyond ASCII"),
        pytest.param("message", b'{"model": null}', True, id="any model"),
        pytest.param("message", b"{}", True, id="no model"),
        pytest.param("message", b"[]", True, id="a list"),
        pytest.param("message", b"{", True, id="no JSON"),
        pytest.param("message", b"", True, id="nothing"),
        pytest.param("message", b"\xff", True, id="no UTF-8"),
        pytest.param("message", '{"model": "another"}', True, id="text instead of bytes"),
    ],
)
def test_message_concerns_the_mirror_unless_it_names_another_model(
    mirrors: Mirrors, kind: str, data: object, concerns: bool
) -> None:
    assert mirrors()._is_relevant({"type": kind, "data": data}) is concerns


def test_message_about_its_model_concerns_the_mirror(store: RangeStore, mirrors: Mirrors) -> None:
    assert mirrors()._is_relevant({"type": "message", "data": store.keys.hint.encode()})


def test_seconds_until_expiry_are_those_of_the_next_erasure(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    mirror = mirrors()
    assert mirror._until_expiry() == float("inf")
    mirror.refresh()
    assert mirror._until_expiry() == float("inf")
    active.set_erasures([erasing("World", WALL + 8), erasing("Sports", WALL + 4)])
    mirror.refresh()
    clock.advance(1.0)
    assert mirror._until_expiry() == 3.0


def test_erasures_are_swept_when_they_expire(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sweep does not delay one that is due shortly after it."""
    active.set_erasures([erasing("World", WALL + 0.375), erasing("Sports", WALL + 0.5), erasing("Business")])
    mirror, reads = reading(mirrors, clock, poll=NEVER)
    held: list[tuple[float, list[str]]] = []
    mirror._on_change = lambda snapshot: held.append((clock.now, concepts(snapshot)))
    feed = listen(mirror, clock, [None] * 4, monkeypatch)
    assert held == [
        (0.0, ["Business", "Sports", "World"]),
        (0.375, ["Business", "Sports"]),
        (0.5, ["Business"]),
    ]
    assert reads == [0.0, 0.0, 0.375, 0.5]
    assert feed.waits[1:] == [0.25, 0.125, 0.125, 0.25, 0.25]
    assert [(each.action, each.concepts) for each in active.audit(2)] == [
        ("expire", ("Sports",)),
        ("expire", ("World",)),
    ]


def test_failing_sweeps_are_spaced_out(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    active.set_erasures([erasing("World", WALL + 0.375)])
    mirror = mirrors(poll=NEVER)
    tries: list[tuple[float, float]] = []

    def expire(now: float) -> LiveState | None:
        tries.append((clock.now, now))
        raise StoreUnavailable("read-only replica")

    monkeypatch.setattr(active, "expire", expire)
    feed = listen(mirror, clock, [None] * 7, monkeypatch)
    assert tries == [(at, WALL + at) for at in (0.375, 0.875, 1.375)]
    assert feed.waits[1:] == [0.25, 0.125, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]


def test_sweep_reads_what_it_left(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    active.set_erasures([erasing("World", WALL + 1), erasing("Sports")])
    mirror = mirrors()
    mirror.refresh()
    mirror._remove_expired()
    assert concepts(mirror.snapshot) == ["Sports", "World"], "not due yet"
    clock.advance(1.0)
    mirror._remove_expired()
    assert concepts(mirror.snapshot) == ["Sports"]


@pytest.mark.parametrize(
    ("error", "ends"),
    [(LiveStateLost("lost"), False), (InvalidRangeSet("bad"), False), (StoreUnavailable("down"), True)],
)
def test_listening_ends_only_where_redis_does_not_answer(
    active: RangeStore,
    mirrors: Mirrors,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    ends: bool,
) -> None:
    """Where it does not, the subscription may be dead too without knowing it."""
    mirror, reads = reading(mirrors, clock, poll=0.25)
    mirror.refresh()

    def peek() -> LiveState | None:
        raise error

    monkeypatch.setattr(active, "read_live_state", peek)
    if ends:
        with pytest.raises(StoreUnavailable, match="down"):
            listen(mirror, clock, [None, None], monkeypatch)
        assert reads == [0.0, 0.0]
    else:
        listen(mirror, clock, [None, None], monkeypatch)
        assert reads == [0.0, 0.0, 0.0, 0.25, 0.5]


def run(mirror: Mirror, clock: Clock, rounds: int, error: Exception | None, lasting: float = 0.0) -> Stopping:
    """Run the mirror's thread function here; each round of listening lasts `lasting` seconds and then fails."""
    stopping = Stopping(clock, rounds)
    mirror._stopping = stopping

    def fail() -> None:
        clock.advance(lasting)
        if error is not None:
            raise error

    mirror._listen = fail  # type: ignore[method-assign]
    mirror._run()
    return stopping


def test_reconnecting_backs_off_up_to_half_a_second(
    active: RangeStore, mirrors: Mirrors, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    mirror, reads = reading(mirrors, clock, poll=NEVER)
    with caplog.at_level(logging.INFO):
        stopping = run(mirror, clock, 7, redis.ConnectionError("reset by peer"))
    assert stopping.waits == [FIRST_BACKOFF, 0.1, 0.2, 0.4, LAST_BACKOFF, LAST_BACKOFF, LAST_BACKOFF]
    assert len(reads) == 7, "it reads without messages, each time"
    assert logged(caplog) == [
        (
            "INFO",
            f"{active.model}: no messages from Redis (Redis cannot be reached (reset by peer): is it running?); "
            "reading on a timer",
        )
    ], "logged once while it lasts"
    assert fields(caplog) == [(active.model, None)]


def test_reconnecting_starts_over_after_long_listening(
    active: RangeStore, mirrors: Mirrors, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.now = 1.0
    with caplog.at_level(logging.INFO):
        assert run(mirrors(), clock, 3, OSError("cut"), lasting=0.75).waits == [FIRST_BACKOFF] * 3
    assert [level for level, _ in logged(caplog)] == ["INFO"] * 3, "each loss after a working connection is logged"
    waits = run(mirrors(), clock, 3, OSError("cut"), lasting=LAST_BACKOFF).waits
    assert waits == [FIRST_BACKOFF, 0.1, 0.2], "not longer than the longest wait"


def test_unreadable_store_does_not_end_the_thread(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def live() -> LiveState:
        raise StoreUnavailable("down")

    monkeypatch.setattr(active, "live_state", live)
    mirror = mirrors()
    assert len(run(mirror, clock, 2, redis.ConnectionError("refused")).waits) == 2
    assert mirror.problem == "down"


def test_unexpected_error_is_logged_and_does_not_end_the_thread(
    active: RangeStore, mirrors: Mirrors, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirrors()
    state = mirror.refresh().live
    caplog.clear()
    run(mirror, clock, 2, RuntimeError("surprise"))
    assert logged(caplog) == [("ERROR", f"{active.model}: unexpected error in the mirror; retrying")] * 2
    assert fields(caplog) == [(active.model, state.generation)] * 2
    assert "RuntimeError: surprise" in caplog.text


def test_silent_redis_is_logged_only_by_the_read(
    active: RangeStore, mirrors: Mirrors, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(mirrors(), clock, 2, StoreUnavailable("already logged"))
        run(mirrors(), clock, 2, None)
    assert logged(caplog) == []


def test_stopped_mirror_does_not_listen(mirrors: Mirrors, clock: Clock) -> None:
    mirror = mirrors()
    mirror._stopping.set()
    mirror._run()
    assert mirror.snapshot is None


def test_age_counts_from_the_last_good_read(active: RangeStore, mirrors: Mirrors, clock: Clock) -> None:
    clock.now = 10.0
    mirror = mirrors()
    clock.advance(2.0)
    assert mirror.age() == 2.0, "since it was made, while nothing was read"
    mirror.refresh()
    assert mirror.age() == 0.0
    clock.advance(3.0)
    assert mirror.age() == 3.0
    active.client.set(active.keys.live, "nonsense")
    with pytest.raises(InvalidRangeSet):
        mirror.refresh()
    assert mirror.age() == 3.0


@pytest.mark.parametrize("emptied", [False, True])
def test_snapshot_is_dated_before_the_read(
    active: RangeStore, mirrors: Mirrors, clock: Clock, monkeypatch: pytest.MonkeyPatch, emptied: bool
) -> None:
    """What changes during a read may have been missed by it."""
    mirror = mirrors()
    if emptied:
        empty(active)
    peek, live, read = active.read_live_state, active.live_state, active.range_sets.read
    monkeypatch.setattr(active, "read_live_state", lambda: (peek(), clock.advance(1.0))[0])
    monkeypatch.setattr(active, "live_state", lambda: (live(), clock.advance(1.0))[0])
    monkeypatch.setattr(active.range_sets, "read", lambda id_: (read(id_), clock.advance(1.0))[0])
    assert mirror.refresh().read_at == 0.0
    clock.now = 10.0
    assert mirror.refresh().read_at == 10.0
