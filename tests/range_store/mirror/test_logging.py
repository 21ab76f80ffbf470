"""What a mirror reports: its problem in one sentence, and log lines with the model and the generation as fields."""

import logging
import shlex

import pytest
import redis

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure, LiveState
from range_store.errors import (
    ForeignRangeSet,
    InvalidRangeSet,
    LiveStateLost,
    RangeStoreError,
    StoreUnavailable,
    UnknownRangeSet,
)
from range_store.storage.mirror import REMIND_SECONDS, ProblemKind, Snapshot, _kind
from range_store.storage.store import RangeStore
from tests.range_store.builders import random_range_set
from tests.range_store.mirror.controlled import Clock, Mirrors, empty, erasing, fields, logged


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "range_store.storage")


@pytest.fixture
def store(redis_client: redis.Redis, store: RangeStore) -> RangeStore:
    """A store whose model has a name that a shell would split."""
    return RangeStore(redis_client, f"{store.model} it's")


def failing(store: RangeStore, monkeypatch: pytest.MonkeyPatch, *errors: RangeStoreError | None) -> None:
    """The next reads of the live state raise these errors; None lets one succeed."""
    left = list(errors)
    peek = store.read_live_state

    def fail() -> LiveState | None:
        error = left.pop(0)
        if error is not None:
            raise error
        return peek()

    monkeypatch.setattr(store, "read_live_state", fail)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StoreUnavailable("down"), "store_down"),
        (LiveStateLost("forgotten"), "lost"),
        (InvalidRangeSet("corrupt"), "range_set"),
        (UnknownRangeSet("abc"), "range_set"),
        (ForeignRangeSet("another model"), "range_set"),
    ],
)
def test_trouble_is_the_kind_of_the_error(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, error: RangeStoreError, kind: ProblemKind
) -> None:
    assert _kind(error) == kind
    mirror = mirrors()
    assert (mirror.store_up, mirror.problem, mirror.problem_kind) == (False, None, None)
    mirror.refresh()
    assert (mirror.store_up, mirror.problem, mirror.problem_kind) == (True, None, None)
    failing(active, monkeypatch, error, None)
    with pytest.raises(type(error)):
        mirror.refresh()
    assert (mirror.store_up, mirror.problem, mirror.problem_kind) == (kind != "store_down", str(error), kind)
    mirror.refresh()
    assert (mirror.store_up, mirror.problem, mirror.problem_kind) == (True, None, None)


def test_problem_is_logged_when_it_begins_and_when_it_ends(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirrors()
    state = mirror.refresh().live
    failing(active, monkeypatch, StoreUnavailable("down"), None, None)
    with pytest.raises(StoreUnavailable):
        mirror.refresh()
    mirror.refresh()
    mirror.refresh()
    assert logged(caplog) == [
        ("ERROR", f"{active.model}: down; generation {state.generation} stays in force"),
        ("INFO", f"{active.model}: the live state is current again"),
    ]
    assert fields(caplog) == [(active.model, state.generation)] * 2


def test_problem_before_the_first_read_is_logged_without_a_generation(
    store: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.set(store.keys.live, "nonsense")
    mirror = mirrors()
    with pytest.raises(InvalidRangeSet) as caught:
        mirror.refresh()
    assert logged(caplog) == [("ERROR", f"{store.model}: {caught.value}; no live state was read yet")]
    assert fields(caplog) == [(store.model, None)]


def test_lasting_problem_is_logged_once_a_minute(
    active: RangeStore,
    mirrors: Mirrors,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What an error says in brackets may differ from try to try."""
    mirror = mirrors()
    mirror.refresh()
    clock.now = 1000.0
    times = (0.0, 1.0, REMIND_SECONDS - 0.5, REMIND_SECONDS, REMIND_SECONDS + 1.0, 2 * REMIND_SECONDS)
    failing(active, monkeypatch, *(StoreUnavailable(f"down (try {n} (or so))") for n in range(len(times))))
    said: list[float] = []
    for at in times:
        clock.now = 1000.0 + at
        before = len(logged(caplog))
        with pytest.raises(StoreUnavailable):
            mirror.refresh()
        said += [at] * (len(logged(caplog)) - before)
    assert said == [0.0, REMIND_SECONDS, 2 * REMIND_SECONDS]


def test_another_problem_is_logged_at_once(
    active: RangeStore,
    mirrors: Mirrors,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock.now = 1.0
    mirror = mirrors()
    state = mirror.refresh().live
    texts = ("down (1)", "cut (1)", "cut (2)", "down (2)")
    failing(active, monkeypatch, *map(StoreUnavailable, texts))
    for _ in texts:
        with pytest.raises(StoreUnavailable):
            mirror.refresh()
    stays = f"generation {state.generation} stays in force"
    assert [message for _, message in logged(caplog)] == [
        f"{active.model}: {text}; {stays}" for text in ("down (1)", "cut (1)", "down (2)")
    ]


def test_emptied_redis_error_says_how_to_restore_it(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh().live
    empty(active)
    with pytest.raises(LiveStateLost) as caught:
        mirror.refresh()
    name = shlex.quote(active.model)
    assert str(caught.value) == (
        f"Redis has lost the live state (was it emptied?), and range set {held.range_set} too. Restore it with "
        f"`neuronlens ranges import FILE --activate --name {name}`, or fit again with `neuronlens fit … --activate "
        f"--name {name}`; this server then restores the live erasures"
    )


def test_new_epoch_error_names_its_generation(active: RangeStore, mirrors: Mirrors) -> None:
    mirror = mirrors()
    held = mirror.refresh().live
    empty(active)
    anew = active.live_state()
    with pytest.raises(LiveStateLost) as caught:
        mirror.refresh()
    assert str(caught.value).startswith(
        f"Redis has lost the live state (it starts again at {anew.generation}), and range set {held.range_set} too."
    )


def test_older_generation_error_names_both(active: RangeStore, mirrors: Mirrors) -> None:
    first = active.live_state()
    copy = active.client.get(active.keys.live)
    second = active.range_sets.publish(*random_range_set(601))
    active.activate(second)
    mirror = mirrors()
    held = mirror.refresh().live
    active.client.set(active.keys.live, copy)
    active.range_sets.remove(second)
    with pytest.raises(LiveStateLost) as caught:
        mirror.refresh()
    assert str(caught.value).startswith(
        f"Redis went back from generation {held.generation} to {first.generation} (is it an older copy?), "
        f"and range set {second} too."
    )


def test_unservable_erasure_error_names_range_set_and_reason(active: RangeStore, mirrors: Mirrors) -> None:
    active.set_erasure(LiveErasure(erasure=Erasure(concept="World", layers=(0,))))
    mirror = mirrors()
    mirror.refresh()
    empty(active)
    fewer = active.range_sets.publish(*random_range_set(606, layers=[2]))
    anew = active.activate(fewer)
    with pytest.raises(LiveStateLost) as caught:
        mirror.refresh()
    assert str(caught.value) == (
        f"Redis has lost the live state (it starts again at {anew.generation}), and range set {fewer}, which is active "
        "now, cannot serve the earlier erasures (layer 0 not fitted; this range set has: 2): activate another one, or "
        "switch on each erasure again with `neuronlens erase on`"
    )


def test_unavailable_store_is_not_reported_as_lost(
    active: RangeStore, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirrors()
    mirror.refresh()
    held = active.live_state()
    empty(active)

    def down(state: LiveState) -> LiveState:
        assert state == held
        raise StoreUnavailable("down")

    active.range_sets.publish(*random_range_set(600))
    monkeypatch.setattr(active, "restore", down)
    with pytest.raises(StoreUnavailable, match=r"^down$") as caught:
        mirror.refresh()
    assert not isinstance(caught.value, LiveStateLost)


def test_foreign_range_set_of_a_new_epoch_is_reported_as_foreign(active: RangeStore, mirrors: Mirrors) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    held = mirror.refresh()
    empty(active)
    active.activate(active.range_sets.publish(*random_range_set(602, fingerprint="ef" * 32)))
    with pytest.raises(ForeignRangeSet, match="efefef"):
        mirror.refresh()
    assert mirror.problem_kind == "range_set"
    assert mirror.snapshot is held


def test_restoring_is_logged(active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    held = mirror.refresh().live
    empty(active)
    active.range_sets.publish(*random_range_set(600))
    state = mirror.refresh().live
    assert state.erasures == held.erasures
    restored, recreated = logged(caplog)
    assert restored == (
        "WARNING",
        f"{active.model}: Redis has lost the live state (was it emptied?); restored as generation {state.generation}",
    )
    assert recreated == (
        "WARNING",
        f"{active.model}: the live state has a new epoch ({held.generation}, then {state.generation}); "
        "no longer erased: nothing",
    )
    assert fields(caplog) == [(active.model, held.generation), (active.model, state.generation)]


def test_dropped_erasures_of_a_new_epoch_are_logged(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasures([erasing("World"), erasing("Business"), erasing("Sports")])
    mirror = mirrors()
    held = mirror.refresh().live
    empty(active)
    active.activate(active.range_sets.publish(*random_range_set(600)))
    state = active.set_erasures([erasing("Sports")])
    assert mirror.refresh().live == state
    assert logged(caplog) == [
        (
            "WARNING",
            f"{active.model}: the live state has a new epoch ({held.generation}, then {state.generation}); "
            "no longer erased: Business, World",
        )
    ]
    assert fields(caplog) == [(active.model, state.generation)]


def test_change_within_an_epoch_is_not_logged(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    mirror.refresh()
    active.set_erasures([])
    mirror.refresh()
    assert logged(caplog) == []


def test_failing_listener_is_logged_with_its_error(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(snapshot: Snapshot) -> None:
        raise RuntimeError("listener broke")

    found = mirrors(on_change=fail).refresh()
    assert logged(caplog) == [("ERROR", f"{active.model}: on_change failed")]
    assert fields(caplog) == [(active.model, found.live.generation)]
    assert "RuntimeError: listener broke" in caplog.text


def test_foreign_range_set_is_refused_and_logged_once(
    active: RangeStore, mirrors: Mirrors, caplog: pytest.LogCaptureFixture
) -> None:
    active.set_erasure(erasing("World"))
    mirror = mirrors()
    held = mirror.refresh()
    active.activate(active.range_sets.publish(*random_range_set(602, fingerprint="ef" * 32)))
    for _ in range(5):
        with pytest.raises(ForeignRangeSet, match="efefef"):
            mirror.refresh()
    assert [level for level, message in logged(caplog) if "efefef" in message] == ["ERROR"]
    assert mirror.snapshot is held
    assert mirror.store_up
    state = active.activate(str(held.live.range_set))
    assert mirror.refresh().live == state
    assert mirror.problem is None
