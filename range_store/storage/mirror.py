"""What a worker holds of the store: the last good snapshot, kept current, and answering while Redis is away.

Truth is what is read; a message only says when to read. So the mirror reads on every hint, whenever it has
(re)subscribed, and on a timer, and a lost message costs seconds. What it reads replaces the snapshot only if all of it
is good: an erasure is never dropped because something else broke (DESIGN promise 5).
"""

import dataclasses
import json
import logging
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import redis

from range_store.domain.live import LiveState
from range_store.domain.range_set import RangeSet, check_model
from range_store.errors import (
    ForeignRangeSet,
    InvalidRangeSet,
    RangeStoreError,
    StoreUnavailable,
    UnknownRangeSet,
)
from range_store.redis_errors import describe_redis_error
from range_store.storage.heartbeat import Heartbeat
from range_store.storage.keys import CHANGES
from range_store.storage.store import RangeStore

log = logging.getLogger(__name__)

LISTEN_SECONDS = 0.2
"""Longest wait for a message before the clock and the end are looked at again."""
SWEEP_SECONDS = 0.5
"""Shortest time between two tries to take expired erasures out of the store."""
FIRST_BACKOFF, LAST_BACKOFF = 0.05, 0.5
"""Seconds between two tries to reach Redis: it is found again half a second after its return at the latest."""
REMIND_SECONDS = 60.0
"""How often what is wrong is logged again while it lasts."""
ProblemKind = Literal["store_down", "lost", "range_set"]
"""Why a snapshot is not the newest: Redis does not answer; it has lost the live state; what is active is unusable."""
ATTEMPTS = 3


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Live state and the range set that it names, read at `read_at` by the monotonic clock."""

    live: LiveState
    range_set: RangeSet | None
    read_at: float


class LostState(StoreUnavailable):
    """Redis answers, but has forgotten what this worker knows to be live, and it cannot be put back yet."""


class Mirror:
    """Keeps a snapshot of one model's live state.

    `snapshot` is read without a lock. `refresh` right after a change in this process makes the next admission see it.

    Args:
        fingerprint: of the model in use; a range set of another model is refused.
        poll: seconds between reads where no message comes.
        on_change: told of every snapshot whose generation differs from the one before, in order. It must be quick.
        also: called whenever the store is to be read, to read something else of it then. It must not raise.
        earlier: what earlier versions had for the fingerprint.
        replica: name to report under (`range_store.storage.replicas.new_replica_name`); None for a mere reader.
    """

    def __init__(
        self,
        store: RangeStore,
        fingerprint: str,
        poll: float = 2.0,
        on_change: Callable[[Snapshot], None] | None = None,
        also: Callable[[], None] | None = None,
        replica: str | None = None,
        earlier: str | None = None,
    ) -> None:
        self._store = store
        self._fingerprints = fingerprint, earlier
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
        self.problem_kind: ProblemKind | None = None
        """The kind of `problem`."""
        self._logged = 0.0
        self.heartbeat: Heartbeat | None = None
        """What tells others which generation this process answers under; None for a mere reader."""
        if replica is not None:
            self.heartbeat = Heartbeat(store.replicas, replica, self._held, self.refresh)

    def start(self) -> None:
        """Read once, and then keep reading in a thread. Does not fail while Redis is away: see `problem`."""
        if self._thread is None:
            with suppress(RangeStoreError):
                self.refresh()
            self._thread = threading.Thread(target=self._run, name="neuronlens-mirror", daemon=True)
            self._thread.start()
            if self.heartbeat is not None:
                self.heartbeat.start()

    def withdraw(self) -> None:
        """Nobody is to wait any more until this replica follows, since it takes no requests. Goes on reading."""
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
        """Unix time by the store's clock, which decides whether an erasure has expired."""
        return self._store.clock.now()

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
                if self.heartbeat is not None:
                    self.heartbeat.wake()
                self._tell(before, fresh)
            return fresh

    def catch_up(self) -> Snapshot:
        """Read now, and have others count on this replica again if they may have given it up; raises as `refresh`."""
        lapsed = self.lapsed
        fresh = self.refresh()
        if self.heartbeat is not None and lapsed:
            self.heartbeat.tell()
        return fresh

    @property
    def lapsed(self) -> bool:
        """Whether others may have given up this replica, as after a pause: `catch_up` before the next admission."""
        return self.heartbeat is not None and self.heartbeat.lapsed

    def _held(self) -> LiveState | None:
        snapshot = self.snapshot
        return snapshot.live if snapshot else None

    def _read(self) -> Snapshot:
        for attempt in range(ATTEMPTS):
            held = self.snapshot
            read_at = time.monotonic()
            if held is None:
                if self.heartbeat is not None:
                    self.heartbeat.tell()  # before the read: who changes something after it knows of this replica
                live = self._store.live()
            else:
                # what is gone is not created anew by one who knew it, but put back
                live = self._restored(held.live, self._store.peek())
            if live.range_set is None:
                return Snapshot(live, None, read_at)
            if held is not None and held.range_set is not None and held.range_set.id == live.range_set:
                return dataclasses.replace(held, live=live, read_at=read_at)
            try:
                check_model(self._store.provenance(live.range_set), *self._fingerprints)
                return Snapshot(live, self._store.read(live.range_set), read_at)
            except UnknownRangeSet:  # another was activated since, and this one removed
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def before_change(self, state: LiveState | None, activates: bool) -> bool:
        """Restore what Redis has forgotten before this server changes anything; the store's `guard`.

        Raises:
            LostState: it cannot be restored, and the change would go on without it. Another range set may be activated
                all the same: on that the erasures are restored.
            ForeignRangeSet: the active range set is of another model, and the change does not activate another one.
        """
        held = self.snapshot
        if held is not None and state != held.live:
            try:
                if self._restored(held.live, state) != state:
                    return True
            except (LostState, ForeignRangeSet):
                if not activates or (state is not None and held.live.is_at_least(state.generation)):
                    raise
        if state is not None and state.range_set is not None and not activates:
            with suppress(UnknownRangeSet, InvalidRangeSet):
                check_model(self._store.provenance(state.range_set), *self._fingerprints)
        return False

    def _restored(self, held: LiveState, found: LiveState | None) -> LiveState:
        """The live state `found`, or what it becomes as what Redis has forgotten of `held` is made live again.

        Raises:
            LostState: it cannot be, until an operator does something; says what.
        """
        wanted = self._store.restored(held, found)
        if wanted is None:
            assert found is not None
            return found
        model = self._store.model
        if found is None:
            why = "Redis has lost the live state (was it emptied?)"
        elif found.generation == held.generation:
            why = f"Redis holds something else as generation {held.generation} (was an older copy of it changed?)"
        elif held.is_at_least(found.generation):
            why = f"Redis went back from generation {held.generation} to {found.generation} (is it an older copy?)"
        else:
            why = f"Redis has lost the live state (it begins anew at {found.generation})"
        range_set = wanted.range_set
        try:
            if range_set is not None:
                check_model(self._store.provenance(range_set), *self._fingerprints)
            state, put_back = self._store.put_back(held)
        except StoreUnavailable:
            raise
        except UnknownRangeSet:
            name = shlex.quote(model)
            raise LostState(
                f"{why}, and range set {range_set} with it. Bring it back: `neuronlens ranges import FILE --activate "
                f"--name {name}`, or fit again with `neuronlens fit … --activate --name {name}`; this server then puts "
                "the live erasures back by itself"
            ) from None
        except ForeignRangeSet:
            raise
        except RangeStoreError as error:
            raise LostState(
                f"{why}, and range set {range_set}, which is active now, cannot serve what was erased ({error}): "
                "activate another one, or switch each erasure on anew with `neuronlens erase on`"
            ) from None
        if put_back:
            log.warning("%s: %s; put back as generation %s", model, why, state.generation, extra=self._where())
        return state

    def _note(self, error: RangeStoreError | None) -> None:
        """Remember what is wrong; log when it begins, when it ends, and now and then while it lasts."""
        self.problem_kind = None if error is None else _kind(error)
        self.store_up = self.problem_kind != "store_down"
        before, self.problem = self.problem, None if error is None else str(error)
        if self.problem is None:
            if before is not None:
                log.info("%s: the live state is current again", self._store.model, extra=self._where())
            return
        now = time.monotonic()
        # what stands in brackets differs from try to try
        same = before is not None and before.split(" (")[0] == self.problem.split(" (")[0]
        if same and now - self._logged < REMIND_SECONDS:
            return
        self._logged = now
        held = self.snapshot
        kept = f"generation {held.live.generation} stays in force" if held else "nothing is known yet"
        log.error("%s: %s; %s", self._store.model, self.problem, kept, extra=self._where())

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
        backoff, heard = FIRST_BACKOFF, True
        while not self._stopping.is_set():
            listening_since = time.monotonic()
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                if heard:
                    said = "%s: no messages from Redis (%s); reading without them"
                    log.info(said, self._store.model, describe_redis_error(error), extra=self._where())
                with suppress(RangeStoreError):  # it says itself what is wrong
                    self.refresh()
            except StoreUnavailable:
                pass  # `refresh` has said it; perhaps a new connection finds the way
            except Exception:
                log.exception("%s: the mirror stumbled, and goes on", self._store.model, extra=self._where())
            heard = time.monotonic() - listening_since > LAST_BACKOFF
            if heard:
                backoff = FIRST_BACKOFF
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)

    def _listen(self) -> None:
        """Read on messages and on time, over one subscription, until it breaks or the mirror is closed.

        Raises:
            StoreUnavailable: Redis did not answer. Then the subscription may be dead too, and not know it.
        """
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
                    try:
                        self.refresh()
                    except LostState:
                        pass
                    except StoreUnavailable:
                        raise
                    except RangeStoreError:
                        pass
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
        return float("inf") if due is None else due - self.now()

    def _sweep(self) -> None:
        """Take expired erasures out of the store; admission obeys their time anyway."""
        with suppress(RangeStoreError):
            self._store.expire(self.now())
            self.refresh()

    def _concerns_us(self, message: dict[str, object]) -> bool:
        if message["type"] != "message":
            return message["type"] == "subscribe"
        try:
            hint = json.loads(str(message["data"], "utf-8") if isinstance(message["data"], bytes) else "")
        except ValueError:
            return True  # who knows what it meant: reading costs little
        return not isinstance(hint, dict) or hint.get("model") in (None, self._store.model)


def _kind(error: RangeStoreError) -> ProblemKind:
    if isinstance(error, LostState):
        return "lost"
    return "store_down" if isinstance(error, StoreUnavailable) else "range_set"
