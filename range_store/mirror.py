"""What a worker holds of the store: the last good snapshot, kept current, and answering while Redis is away.

Truth is what is read; a message only says when to read. So the mirror reads on every hint, whenever it has
(re)subscribed, and on a timer, and a lost message costs seconds. What it reads replaces the snapshot only if all of it
is good: an erasure is never dropped because something else broke (DESIGN promise 5).
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

from range_store.errors import RangeStoreError, StoreUnavailable, UnknownRangeSet
from range_store.failures import explain
from range_store.keys import CHANGES
from range_store.live import LiveState
from range_store.range_set import RangeSet, check_model
from range_store.store import RangeStore

log = logging.getLogger(__name__)

LISTEN_SECONDS = 0.2
"""Longest wait for a message before the clock and the end are looked at again."""
SWEEP_SECONDS = 0.5
"""Shortest time between two tries to take expired erasures out of the store."""
FIRST_BACKOFF, LAST_BACKOFF = 0.05, 1.0
Trouble = Literal["store_down", "lost", "range_set"]
"""Why a snapshot is not the newest: Redis does not answer; it has lost the live state; what is active is unusable."""
ATTEMPTS = 3


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Live state and the range set that it names, read at `read_at` by the monotonic clock."""

    live: LiveState
    range_set: RangeSet | None
    read_at: float


class LostState(StoreUnavailable):
    """Redis answers, but has forgotten or undone what this worker knows to be live."""


class Mirror:
    """Keeps a snapshot of one model's live state.

    `snapshot` is read without a lock. `refresh` right after a change in this process makes the next admission see it.

    Args:
        fingerprint: of the model in use; a range set of another model is refused.
        poll: seconds between reads where no message comes.
        on_change: told of every snapshot whose generation differs from the one before, in order. It must be quick.
        also: called whenever the store is to be read, to read something else of it then. It must not raise.
    """

    def __init__(
        self,
        store: RangeStore,
        fingerprint: str,
        poll: float = 2.0,
        on_change: Callable[[Snapshot], None] | None = None,
        also: Callable[[], None] | None = None,
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._poll = poll
        self._on_change = on_change
        self._also = also
        self._reading = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()
        self.snapshot: Snapshot | None = None
        """The last good one; None before the first."""
        self.store_up = False
        """Whether Redis answered last time."""
        self.problem: str | None = None
        """Why the snapshot is not the newest, or None while it is."""
        self.trouble: Trouble | None = None
        """The kind of `problem`."""

    def start(self) -> None:
        """Read once, and then keep reading in a thread. Does not fail while Redis is away: see `problem`."""
        if self._thread is None:
            with suppress(RangeStoreError):
                self.refresh()
            self._thread = threading.Thread(target=self._run, name="neuronlens-mirror", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop reading. The snapshot stays."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def age(self) -> float:
        """Seconds since the snapshot was last known to be the newest; since the mirror was made, if there is none."""
        snapshot = self.snapshot
        return time.monotonic() - (snapshot.read_at if snapshot else self._began)

    def refresh(self) -> Snapshot:
        """Read now; the snapshot is then at least as new as this call.

        Raises:
            StoreUnavailable: Redis cannot be reached, or has lost the live state. The last good snapshot stays.
            ForeignRangeSet: the active range set is of another model. The last good snapshot stays.
            InvalidRangeSet, UnknownRangeSet: it is corrupt or gone. The last good snapshot stays.
        """
        with self._reading:  # one at a time: a slow read never overwrites what a later one found
            try:
                fresh = self._read()
            except RangeStoreError as error:
                self._note(error)
                raise
            finally:
                if self._also is not None:
                    self._also()
            before, self.snapshot = self.snapshot, fresh
            self._note(None)
            if before is None or before.live != fresh.live:
                self._tell(before, fresh)
            return fresh

    def _read(self) -> Snapshot:
        for attempt in range(ATTEMPTS):
            held = self.snapshot
            read_at = time.monotonic()
            # What is gone is only created anew by one who never knew it.
            live = self._store.live() if held is None else self._store.peek()
            live = _not_lost(held, live)
            if live.range_set is None:
                return Snapshot(live, None, read_at)
            if held is not None and held.range_set is not None and held.range_set.id == live.range_set:
                return dataclasses.replace(held, live=live, read_at=read_at)
            try:
                check_model(self._store.provenance(live.range_set), self._fingerprint)
                return Snapshot(live, self._store.read(live.range_set), read_at)
            except UnknownRangeSet:  # another was activated since, and this one removed
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _note(self, error: RangeStoreError | None) -> None:
        """Remember what is wrong, and log it when it begins and when it ends."""
        self.store_up = not isinstance(error, StoreUnavailable) or isinstance(error, LostState)
        problem = None if error is None else str(error)
        if problem is not None and problem != self.problem:
            kept = (
                f"generation {self.snapshot.live.generation} stays in force"
                if self.snapshot
                else "nothing is known yet"
            )
            log.error("%s: %s; %s", self._store.model, problem, kept, extra=self._where())
        elif problem is None and self.problem is not None:
            log.info("%s: the live state is current again", self._store.model, extra=self._where())
        self.problem = problem
        self.trouble = None if error is None else _kind(error)

    def _tell(self, before: Snapshot | None, fresh: Snapshot) -> None:
        if before is not None and before.live.epoch != fresh.live.epoch:
            dropped = {each.concept for each in before.live.erasures} - {each.concept for each in fresh.live.erasures}
            log.warning(
                "%s: the live state was created anew (%s, then %s); no longer erased: %s",
                self._store.model,
                before.live.generation,
                fresh.live.generation,
                ", ".join(sorted(dropped)) or "nothing",
                extra=self._where(),
            )
        if self._on_change is not None:
            try:
                self._on_change(fresh)
            except Exception:
                log.exception("%s: on_change failed", self._store.model, extra=self._where())

    def _where(self) -> dict[str, str]:
        """Fields of a log line: the model, and the generation that is held."""
        held = self.snapshot
        return {"model": self._store.model} | ({"generation": held.live.generation} if held else {})

    def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while not self._stopping.is_set():
            listening_since = time.monotonic()
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                said = "%s: no messages from Redis (%s); reading without them"
                log.info(said, self._store.model, explain(error), extra=self._where())
                with suppress(RangeStoreError):  # it says itself what is wrong
                    self.refresh()
            except Exception:
                log.exception("%s: the mirror stumbled, and goes on", self._store.model, extra=self._where())
            if time.monotonic() - listening_since > LAST_BACKOFF:
                backoff = FIRST_BACKOFF
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)

    def _listen(self) -> None:
        """Read on messages and on time, over one subscription, until it breaks or the mirror is closed."""
        with self._store.client.pubsub() as feed:  # type: ignore[no-untyped-call]
            feed.subscribe(CHANGES)
            next_poll = next_sweep = time.monotonic()
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= next_sweep and self._until_expiry() <= 0:
                    self._sweep()
                    next_sweep = now + SWEEP_SECONDS if self._until_expiry() <= 0 else now
                if now >= next_poll:
                    next_poll = now + self._poll
                    with suppress(RangeStoreError):
                        self.refresh()
                now = time.monotonic()
                wait = min(LISTEN_SECONDS, next_poll - now, max(next_sweep - now, self._until_expiry()))
                message = feed.get_message(timeout=max(wait, 0.0))
                while message is not None:
                    if self._concerns_us(message):
                        next_poll = 0.0  # the subscription's own message too: what came before it is read now
                    message = feed.get_message(timeout=0.0)

    def _until_expiry(self) -> float:
        """Seconds until the next erasure expires."""
        due = self.snapshot.live.next_expiry if self.snapshot else None
        return float("inf") if due is None else due - time.time()

    def _sweep(self) -> None:
        """Take expired erasures out of the store; admission obeys their time anyway."""
        with suppress(RangeStoreError):
            self._store.expire(time.time())
            self.refresh()

    def _concerns_us(self, message: dict[str, object]) -> bool:
        if message["type"] != "message":
            return message["type"] == "subscribe"
        try:
            hint = json.loads(str(message["data"], "utf-8") if isinstance(message["data"], bytes) else "")
        except ValueError:
            return True  # who knows what it meant: reading costs little
        return not isinstance(hint, dict) or hint.get("model") in (None, self._store.model)


def _kind(error: RangeStoreError) -> Trouble:
    if isinstance(error, LostState):
        return "lost"
    return "store_down" if isinstance(error, StoreUnavailable) else "range_set"


def _not_lost(held: Snapshot | None, live: LiveState | None) -> LiveState:
    """`live`, if it can be the successor of what is held.

    Raises:
        LostState: Redis was emptied, or went back to an older state. Only an operator's change settles what is to
            be: the first one of a new epoch, or one that passes the generation that is held.
    """
    advice = "activate a range set and switch the erasures on again"
    if live is None:
        raise LostState(f"Redis has lost the live state (was it emptied?): {advice}")
    if held is None or live == held.live:
        return live
    if live.epoch != held.live.epoch:
        knew_something = held.live.range_set is not None or held.live.erasures
        if live.counter == 0 and knew_something:
            raise LostState(f"Redis has lost the live state (it begins anew at {live.generation}): {advice}")
    elif live.counter < held.live.counter:
        raise LostState(
            f"Redis went back from generation {held.live.generation} to {live.generation} (was an old copy restored?): "
            "switch the erasures on again"
        )
    return live
