"""The store of one served model: its range sets, its live state with the audit of all changes, and its replicas."""

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import redis
from pydantic import ValidationError

from range_store.domain.erasure import check_distinct_concepts
from range_store.domain.live import Action, AuditEntry, Change, LiveErasure, LiveState, initial_state
from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from range_store.domain.recovery import recovered_state
from range_store.errors import (
    InvalidRangeSet,
    NoRangeSet,
    RangeStoreError,
    StaleGeneration,
    StoreUnavailable,
    UnknownConcept,
    UnknownRangeSet,
    UnresolvableErasure,
)
from range_store.redis_errors import translate_redis_errors
from range_store.storage.clock import StoreClock
from range_store.storage.range_sets import PublishedRangeSets
from range_store.storage.replicas import ReplicaRegistry
from range_store.storage.schema import CHANGE_LIVE, CHANGES, ModelKeys

AUDIT_LENGTH = 10_000
RECENT = 100
"""The newest audit entries, among which a repeated request is searched for."""
ATTEMPTS = 200
"""Attempts of a change while others change the same live state; each failed one means that another one succeeded."""


class BeforeChange(Protocol):
    """Checks the live state before a change; `activates` says whether the change activates a range set.

    Returns whether it restored something, so that the state must be read again. Raises to refuse the change.
    """

    def __call__(self, state: LiveState | None, activates: bool) -> bool: ...


class _Decision(Protocol):
    """Computes the new live state from the current one, or None to leave it as it is. It may be called repeatedly."""

    def __call__(self, state: LiveState, now: float) -> tuple[LiveState, Change] | None: ...


class RangeStore:
    """The store of one served model; safe to use from any thread.

    Every change of the live state is atomic: it writes a new generation, an audit entry and a hint to readers, or
    nothing. With `if_match`, a change succeeds only at that generation; without it, it is retried until it succeeds.
    `request` is an id that `has_change_for` finds. Every method raises StoreUnavailable if Redis cannot be reached or
    refuses.
    """

    def __init__(self, client: redis.Redis, model: str) -> None:
        self.client = client
        self.model = model
        self.keys = ModelKeys(model)
        self.range_sets = PublishedRangeSets(client, model, self._active_id)
        """The published range sets of the model."""
        self.replicas = ReplicaRegistry(client, model)
        """Which processes answer for the model, and at which generation."""
        self.clock = StoreClock()
        """The clock by which erasures expire."""
        self.before_change: BeforeChange | None = None
        """Called before every change; a server sets `Mirror.before_change`."""
        self._change_live = client.register_script(CHANGE_LIVE)
        self._resolver: RangeSet | None = None

    def read_live_state(self) -> LiveState | None:
        """Return the live state, or None if there is none: it was never written, or Redis was emptied.

        Raises:
            InvalidRangeSet: it is unreadable.
        """
        return self._read()[1]

    def live_state(self) -> LiveState:
        """Return the live state. Where there is none, an empty one in a new epoch is created."""
        _, state = self._read()
        while state is None:
            created = initial_state()
            self._write(b"", created, [Change(action="create", before=None, after=created.generation, range_set=None)])
            _, state = self._read()  # another reader may have been first
        return state

    def set_erasures(
        self,
        erasures: Sequence[LiveErasure],
        if_match: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        request: str | None = None,
    ) -> LiveState:
        """Replace all live erasures in one generation.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            NoRangeSet: no range set is active.
            InvalidErasure, UnknownConcept, NotFitted: an erasure cannot be resolved on the active range set.
        """
        check_distinct_concepts([each.concept for each in erasures])

        def replace(state: LiveState, now: float) -> tuple[LiveState, Change]:
            self._check_resolvable(state, erasures)
            after = state.next_generation(state.range_set, tuple(erasures))
            concepts = {each.concept for each in (*state.erasures, *erasures)}
            return after, _change("replace", state, after, concepts, by, reason)

        return self._update(replace, if_match, request=request)

    def set_erasure(self, erasure: LiveErasure, if_match: str | None = None, request: str | None = None) -> LiveState:
        """Switch on or change the erasure of one concept. The audit takes `by` and `reason` from it.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            NoRangeSet: no range set is active.
            InvalidErasure, UnknownConcept, NotFitted: it cannot be resolved on the active range set.
        """

        def switch_on(state: LiveState, now: float) -> tuple[LiveState, Change]:
            self._check_resolvable(state, [erasure])
            others = tuple(each for each in state.erasures if each.concept != erasure.concept)
            after = state.next_generation(state.range_set, (*others, erasure))
            return after, _change("set", state, after, [erasure.concept], erasure.by, erasure.reason)

        return self._update(switch_on, if_match, request=request)

    def remove_erasure(
        self,
        concept: str,
        if_match: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        request: str | None = None,
    ) -> LiveState:
        """Switch off the erasure of one concept. If it is off already, nothing changes.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            UnknownConcept: it is not erased, and the active range set has no such concept.
        """

        def switch_off(state: LiveState, now: float) -> tuple[LiveState, Change] | None:
            others = tuple(each for each in state.erasures if each.concept != concept)
            if len(others) == len(state.erasures):
                known = self.range_sets.provenance(state.range_set).concepts if state.range_set else ()
                if concept not in known:
                    raise UnknownConcept(concept, known)
                return None
            after = state.next_generation(state.range_set, others)
            return after, _change("remove", state, after, [concept], by, reason)

        return self._update(switch_off, if_match, request=request)

    def activate(
        self,
        range_set: str,
        force: bool = False,
        if_match: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        request: str | None = None,
    ) -> LiveState:
        """Activate a published range set: erasures are resolved on it from now on.

        Args:
            force: remove live erasures that cannot be resolved on it, except enforced ones; the audit names them.

        Raises:
            UnknownRangeSet: no range set with that id is published.
            InvalidRangeSet: it is corrupt.
            UnresolvableErasure: a live erasure cannot be resolved on it, and is enforced or `force` is not set.
            StaleGeneration: the state is not at `if_match`.
        """
        candidate = self.range_sets.read(range_set)

        def switch(state: LiveState, now: float) -> tuple[LiveState, Change]:
            why = {each.concept: why for each in state.erasures if (why := _unresolvable(candidate, each))}
            enforced = {
                each.concept: why[each.concept] for each in state.erasures if each.enforced and each.concept in why
            }
            if why and (enforced or not force):
                refusing = enforced or why
                raise UnresolvableErasure(
                    f"range set {range_set} cannot serve the live erasures of {', '.join(map(repr, refusing))} "
                    f"({'; '.join(refusing.values())}): switch them off"
                    + (" first, since they are enforced" if enforced else ", or use force to remove them")
                )
            kept = tuple(each for each in state.erasures if each.concept not in why)
            after = state.next_generation(range_set, kept)
            change = _change("activate", state, after, (), by, reason)
            return after, change.model_copy(update={"dropped": tuple(sorted(why))})

        state = self._update(switch, if_match, activates=True, request=request)
        self._resolver = candidate
        return state

    def recovered(self, held: LiveState, stored: LiveState | None) -> LiveState | None:
        """Return the state to write if the `stored` one lacks changes of the `held` one; see `recovered_state`."""
        return recovered_state(held, stored, lambda: self.audit(AUDIT_LENGTH), self.clock.now())

    def restore(self, held: LiveState) -> tuple[LiveState, bool]:
        """Restore atomically what Redis has lost of `held`.

        Returns:
            The live state, and whether this call changed it. Redis, or another server, may have had it all.

        Raises:
            UnknownRangeSet: the range set is no longer published.
            UnknownConcept, NotFitted: the range set that was activated since cannot serve the erasures.
        """
        for attempt in range(ATTEMPTS):
            raw, state = self._read()
            after = self.recovered(held, state)
            if after is None:
                assert state is not None
                return state, False
            self._check_resolvable(after, after.erasures)
            change = Change(
                action="restore",
                before=state.generation if state else None,
                after=after.generation,
                range_set=after.range_set,
                concepts=tuple(each.concept for each in after.erasures),
                by="server",
                reason=f"Redis had lost generation {held.generation}",
            )
            if self._write(raw, after, [change]):
                return after, True
            _pause(attempt)
        raise self._too_many_changes()

    def expire(self, now: float) -> LiveState | None:
        """Remove the erasures that have expired at Unix time `now`, in a generation of its own.

        Returns:
            The live state; None if there is none.
        """
        return None if self.read_live_state() is None else self._update(lambda state, _: None, None, now)

    def audit(self, limit: int = 100) -> Sequence[AuditEntry]:
        """Return the last `limit` changes of the live state, newest first.

        Raises:
            InvalidRangeSet: an entry is unreadable.
        """
        with translate_redis_errors():
            stored: Any = self.client.xrevrange(self.keys.audit, count=max(limit, 1))
        entries = []
        for id_, fields in stored:
            try:
                change = Change.model_validate_json(fields[b"change"])
            except (ValidationError, KeyError):
                raise InvalidRangeSet(f"entry {id_.decode()} of the audit of {self.model!r} is unreadable") from None
            entries.append(AuditEntry(id=id_.decode(), at=int(id_.split(b"-")[0]) / 1000, **change.model_dump()))
        return entries

    def has_change_for(self, request: str) -> bool:
        """Whether one of the last changes has this request id."""
        with translate_redis_errors():
            stored: Any = self.client.xrevrange(self.keys.audit, count=RECENT)
        return any(fields.get(b"request") == request.encode() for _, fields in stored)

    def _update(
        self,
        decide: _Decision,
        if_match: str | None,
        now: float | None = None,
        *,
        activates: bool = False,
        request: str | None = None,
    ) -> LiveState:
        """Read, decide, compare and set until it succeeds. Expired erasures are removed first, in a generation."""
        for attempt in range(ATTEMPTS):
            raw, state = self._read()
            if self.before_change is not None and self.before_change(state, activates):
                continue
            if state is None:
                self.live_state()
                continue
            if if_match is not None and if_match != state.generation:
                raise StaleGeneration(if_match, state.generation)
            at = self.clock.now() if now is None else now
            changes = []
            unexpired = state.active_at(at)
            if len(unexpired) < len(state.erasures):
                expired = {each.concept for each in state.erasures if each.expired(at)}
                before, state = state, state.next_generation(state.range_set, unexpired)
                changes.append(_change("expire", before, state, expired))
            if decided := decide(state, at):
                state, change = decided
                changes.append(change)
            if not changes or self._write(raw, state, changes, request):
                return state
            _pause(attempt)
        raise self._too_many_changes()

    def _too_many_changes(self) -> StoreUnavailable:
        return StoreUnavailable(f"too many concurrent changes of the live state of {self.model!r}: try again")

    def _read(self) -> tuple[bytes, LiveState | None]:
        raw = self.clock.get(self.client, self.keys.live)
        if raw is None:
            return b"", None
        try:
            return raw, LiveState.model_validate_json(raw)
        except ValidationError:
            raise InvalidRangeSet(
                f"the live state of {self.model!r} is unreadable: was it written by another program or a newer version?"
            ) from None

    def _write(self, expected: bytes, state: LiveState, changes: Iterable[Change], request: str | None = None) -> bool:
        """Replace the live state if it is still `expected`, and return whether it was.

        Raises:
            UnknownRangeSet: the range set to activate is no longer published.
        """
        activated = any(change.action in ("activate", "restore") for change in changes)
        arguments: list[bytes | str | int] = [
            expected,
            state.model_dump_json(),
            (state.range_set or "") if activated else "",
            CHANGES,
            self.keys.hint,
            AUDIT_LENGTH,
            request or "",
            *(change.model_dump_json() for change in changes),
        ]
        with translate_redis_errors():
            answer = self._change_live([self.keys.live, self.keys.audit, self.keys.range_sets], arguments)
        if answer == b"unpublished":
            raise UnknownRangeSet(state.range_set or "")
        return bool(answer == b"done")

    def _check_resolvable(self, state: LiveState, erasures: Sequence[LiveErasure]) -> None:
        if not erasures:
            return
        if state.range_set is None:
            raise NoRangeSet
        if self._resolver is None or self._resolver.id != state.range_set:
            self._resolver = self.range_sets.read(state.range_set)
        resolver = self._resolver
        resolve(resolver, [each.erasure for each in erasures])

    def _active_id(self) -> str | None:
        state = self.read_live_state()
        return state.range_set if state else None


def _unresolvable(range_set: RangeSet, live: LiveErasure) -> str | None:
    """Return why an erasure cannot be resolved on a range set, or None if it can."""
    try:
        resolve(range_set, [live.erasure])
    except RangeStoreError as error:
        return str(error)
    return None


def _pause(attempt: int) -> None:
    """Wait a random time that grows with the attempts, while others change the same live state."""
    time.sleep(random.uniform(0, 0.001 * min(attempt, 20)))


def _change(
    action: Action,
    before: LiveState,
    after: LiveState,
    concepts: Iterable[str],
    by: str | None = None,
    reason: str | None = None,
) -> Change:
    return Change(
        action=action,
        before=before.generation,
        after=after.generation,
        range_set=after.range_set,
        concepts=tuple(sorted(concepts)),
        by=by,
        reason=reason,
    )
