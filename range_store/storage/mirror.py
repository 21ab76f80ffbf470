"""Keeps a snapshot of the store in each process, and answers from the last good one while Redis is away.

A message only says when to read. The mirror reads on every message, after each (re)subscription and on a timer, so a
lost message costs seconds and nothing else. A read replaces the snapshot only if everything in it is valid: no failure
ever drops an erasure.
"""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import redis

from range_store.domain.live import LiveState
from range_store.domain.range_set import RangeSet, check_model
from range_store.errors import LiveStateLost, RangeStoreError, StoreUnavailable, UnknownRangeSet
from range_store.redis_errors import describe_redis_error
from range_store.storage.heartbeat import Heartbeat
from range_store.storage.recovery import LiveStateRecovery
from range_store.storage.schema import CHANGES
from range_store.storage.store import RangeStore

log = logging.getLogger(__name__)

LISTEN_SECONDS = 0.2
"""Longest wait for a message, after which timers and `close` are checked."""
SWEEP_SECONDS = 0.5
"""Shortest time between two attempts to remove expired erasures from the store."""
FIRST_BACKOFF, LAST_BACKOFF = 0.05, 0.5
"""Seconds between attempts to reach Redis: its return is noticed within half a second."""
REMIND_SECONDS = 60.0
"""Time after which a lasting problem is logged again."""
ATTEMPTS = 3
ProblemKind = Literal["store_down", "lost", "range_set"]
"""Why a snapshot is stale: Redis does not answer; it has lost the live state; the active range set is unusable."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The live state and its range set, read at `read_at` by the monotonic clock."""

    live: LiveState
    range_set: RangeSet | None
    read_at: float


class Mirror:
    """Keeps a snapshot of one model's live state.

    `snapshot` is read without a lock. Call `refresh` right after a change, so that the next admission sees it.

    Args:
        fingerprint: of the model in use; range sets of other models are refused.
        poll: seconds between reads while no message arrives.
        on_change: called in order with every snapshot that has a new live state. It must be quick.
        on_read: called whenever the store is read, to read other data too. It must not raise.
        replica: name for status reports (`range_store.storage.replicas.new_replica_name`); None to report nothing.
        earlier_fingerprint: the fingerprint of the same model in earlier versions.
    """

    def __init__(
        self,
        store: RangeStore,
        fingerprint: str,
        poll: float = 2.0,
        on_change: Callable[[Snapshot], None] | None = None,
        on_read: Callable[[], None] | None = None,
        replica: str | None = None,
        earlier_fingerprint: str | None = None,
    ) -> None:
        self._store = store
        self._fingerprints = fingerprint, earlier_fingerprint
        self._recovery = LiveStateRecovery(store, self._fingerprints)
        self._poll = poll
        self._on_change = on_change
        self._on_read = on_read
        self._reading = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._created_at = time.monotonic()
        self._logged_at = 0.0
        self.snapshot: Snapshot | None = None
        """The last good snapshot; None before the first one."""
        self.store_up = False
        """Whether Redis answered the last read."""
        self.problem: str | None = None
        """Why the snapshot is stale; None while it is current."""
        self.problem_kind: ProblemKind | None = None
        self.heartbeat: Heartbeat | None = None
        """Reports this replica's generation; None without a replica name."""
        if replica is not None:
            self.heartbeat = Heartbeat(store.replicas, replica, self._held, self.refresh)

    def start(self) -> None:
        """Read once, then keep reading in a thread. Does not fail while Redis is away: see `problem`."""
        if self._thread is None:
            with suppress(RangeStoreError):
                self.refresh()
            self._thread = threading.Thread(target=self._run, name="neuronlens-mirror", daemon=True)
            self._thread.start()
            if self.heartbeat is not None:
                self.heartbeat.start()

    def withdraw(self) -> None:
        """Stop reporting, as this replica takes no more requests, so that nobody waits for it. Reading goes on."""
        if self.heartbeat is not None:
            self.heartbeat.withdraw()

    def close(self) -> None:
        """Stop reading and reporting. The snapshot stays."""
        self._stopping.set()
        if self.heartbeat is not None:
            self.heartbeat.close()
        if self._thread is not None:
            self._thread.join()

    def now(self) -> float:
        """Return Unix time by the store's clock, which decides whether an erasure has expired."""
        return self._store.clock.now()

    def age(self) -> float:
        """Return the seconds since the snapshot was last known to be current, or since the mirror was created."""
        snapshot = self.snapshot
        return time.monotonic() - (snapshot.read_at if snapshot else self._created_at)

    def refresh(self) -> Snapshot:
        """Read now, and return a snapshot at least as new as this call.

        Raises:
            StoreUnavailable: Redis cannot be reached, or has lost the live state. The last good snapshot stays.
            ForeignRangeSet: the active range set is of another model. The last good snapshot stays.
            InvalidRangeSet, UnknownRangeSet: it is corrupt or gone. The last good snapshot stays.
        """
        with self._reading:  # one read at a time: a slow one must not overwrite the result of a later one
            try:
                fresh = self._read()
            except RangeStoreError as error:
                self._set_problem(error)
                raise
            finally:
                if self._on_read is not None:
                    self._on_read()
            before, self.snapshot = self.snapshot, fresh
            self._set_problem(None)
            if before is None or before.live != fresh.live:
                if self.heartbeat is not None:
                    self.heartbeat.wake()
                self._announce(before, fresh)
            return fresh

    def catch_up(self) -> Snapshot:
        """Read now, and report if other processes may have given up this replica; raises as `refresh`."""
        lapsed = self.lapsed
        fresh = self.refresh()
        if self.heartbeat is not None and lapsed:
            self.heartbeat.report()
        return fresh

    @property
    def lapsed(self) -> bool:
        """Whether others may have given up this replica, e.g. after a pause: `catch_up` before the next admission."""
        return self.heartbeat is not None and self.heartbeat.lapsed

    def before_change(self, state: LiveState | None, activates: bool) -> bool:
        """Restore what Redis has lost before a change; a server sets this as `RangeStore.before_change`.

        Raises:
            LiveStateLost, ForeignRangeSet: see `LiveStateRecovery.before_change`.
        """
        return self._recovery.before_change(self._held(), state, activates)

    def _held(self) -> LiveState | None:
        snapshot = self.snapshot
        return snapshot.live if snapshot else None

    def _read(self) -> Snapshot:
        for attempt in range(ATTEMPTS):
            held = self.snapshot
            read_at = time.monotonic()
            if held is None:
                if self.heartbeat is not None:
                    self.heartbeat.report()  # before the read: whoever changes something later sees this replica
                live = self._store.live_state()
            else:  # a lost state is restored, never created empty
                live = self._recovery.restore(held.live, self._store.read_live_state())
            if live.range_set is None:
                return Snapshot(live, None, read_at)
            if held is not None and held.range_set is not None and held.range_set.id == live.range_set:
                return dataclasses.replace(held, live=live, read_at=read_at)
            try:
                check_model(self._store.range_sets.provenance(live.range_set), *self._fingerprints)
                return Snapshot(live, self._store.range_sets.read(live.range_set), read_at)
            except UnknownRangeSet:  # another one was activated since, and this one removed
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _set_problem(self, error: RangeStoreError | None) -> None:
        """Remember what is wrong. Log when it begins, when it ends, and once a minute while it lasts."""
        self.problem_kind = None if error is None else _kind(error)
        self.store_up = self.problem_kind != "store_down"
        before, self.problem = self.problem, None if error is None else str(error)
        if self.problem is None:
            if before is not None:
                log.info("%s: the live state is current again", self._store.model, extra=self._log_fields())
            return
        now = time.monotonic()
        # the text in parentheses may differ between attempts
        same = before is not None and before.split(" (")[0] == self.problem.split(" (")[0]
        if same and now - self._logged_at < REMIND_SECONDS:
            return
        self._logged_at = now
        held = self.snapshot
        kept = f"generation {held.live.generation} stays in force" if held else "no live state was read yet"
        log.error("%s: %s; %s", self._store.model, self.problem, kept, extra=self._log_fields())

    def _announce(self, before: Snapshot | None, fresh: Snapshot) -> None:
        if before is not None and before.live.epoch != fresh.live.epoch:
            dropped = {each.concept for each in before.live.erasures} - {each.concept for each in fresh.live.erasures}
            log.warning(
                "%s: the live state has a new epoch (%s, then %s); no longer erased: %s",
                self._store.model,
                before.live.generation,
                fresh.live.generation,
                ", ".join(sorted(dropped)) or "nothing",
                extra=self._log_fields(),
            )
        if self._on_change is not None:
            try:
                self._on_change(fresh)
            except Exception:
                log.exception("%s: on_change failed", self._store.model, extra=self._log_fields())

    def _log_fields(self) -> dict[str, str]:
        held = self.snapshot
        return {"model": self._store.model} | ({"generation": held.live.generation} if held else {})

    def _run(self) -> None:
        backoff, listened = FIRST_BACKOFF, True
        while not self._stopping.is_set():
            listening_since = time.monotonic()
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                if listened:
                    text = "%s: no messages from Redis (%s); reading on a timer"
                    log.info(text, self._store.model, describe_redis_error(error), extra=self._log_fields())
                with suppress(RangeStoreError):  # `refresh` logs it
                    self.refresh()
            except StoreUnavailable:
                pass  # logged by `refresh`; a new connection may work
            except Exception:
                log.exception(
                    "%s: unexpected error in the mirror; retrying", self._store.model, extra=self._log_fields()
                )
            listened = time.monotonic() - listening_since > LAST_BACKOFF
            if listened:
                backoff = FIRST_BACKOFF
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)

    def _listen(self) -> None:
        """Read on messages and on a timer, over one subscription, until it breaks or the mirror is closed.

        Raises:
            StoreUnavailable: Redis did not answer a read. The subscription may be dead without an error.
        """
        with self._store.client.pubsub() as feed:  # type: ignore[no-untyped-call]
            feed.subscribe(CHANGES)
            next_poll = next_sweep = time.monotonic()
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= next_sweep and self._until_expiry() <= 0:
                    self._remove_expired()
                    next_sweep = now + SWEEP_SECONDS if self._until_expiry() <= 0 else now
                if now >= next_poll:
                    next_poll = now + self._poll
                    try:
                        self.refresh()
                    except RangeStoreError as error:
                        if _kind(error) == "store_down":
                            raise
                now = time.monotonic()
                wait = min(LISTEN_SECONDS, next_poll - now, max(next_sweep - now, self._until_expiry()))
                message = feed.get_message(timeout=max(wait, 0.0))
                while message is not None:
                    if self._is_relevant(message):
                        next_poll = 0.0
                    message = feed.get_message(timeout=0.0)

    def _until_expiry(self) -> float:
        """Return the seconds until the next erasure expires."""
        due = self.snapshot.live.next_expiry if self.snapshot else None
        return float("inf") if due is None else due - self.now()

    def _remove_expired(self) -> None:
        """Remove expired erasures from the store. Admission ignores them already."""
        with suppress(RangeStoreError):
            self._store.expire(self.now())
            self.refresh()

    def _is_relevant(self, message: dict[str, object]) -> bool:
        """Whether to read now. A new subscription is relevant: earlier messages may have been missed."""
        if message["type"] != "message":
            return message["type"] == "subscribe"
        try:
            hint = json.loads(str(message["data"], "utf-8") if isinstance(message["data"], bytes) else "")
        except ValueError:
            return True  # unknown messages cost one read
        return not isinstance(hint, dict) or hint.get("model") in (None, self._store.model)


def _kind(error: RangeStoreError) -> ProblemKind:
    if isinstance(error, LiveStateLost):
        return "lost"
    return "store_down" if isinstance(error, StoreUnavailable) else "range_set"
