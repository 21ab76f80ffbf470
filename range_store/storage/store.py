"""`RangeStore`: the range sets of one served model, its live erasures, and the audit of who changed them."""

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import redis
from pydantic import ValidationError

from range_store.domain.erasure import check_distinct_concepts
from range_store.domain.live import AuditEntry, Change, LiveErasure, LiveState, initial_state, is_at_least, new_epoch
from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
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
from range_store.storage.codec import assemble
from range_store.storage.keys import CHANGES
from range_store.storage.range_sets import PublishedRangeSet, PublishedRangeSets
from range_store.storage.replicas import ReplicaRegistry
from range_store.storage.scripts import CHANGE_LIVE

__all__ = ["PublishedRangeSet", "RangeStore", "assemble"]

AUDIT_LENGTH = 10_000
RECENT = 100
"""Entries of the audit, newest first, among which a request that comes again is looked for."""
ATTEMPTS = 200
"""Tries of a change while others change the same live state; each failed one means that another succeeded."""


class Guard(Protocol):
    """Told of the state that a change is to be based on, and whether the change activates a range set.

    Returns whether it has put something back, so that the state must be read again; raises to refuse the change.
    """

    def __call__(self, state: LiveState | None, activates: bool) -> bool: ...


class _Decision(Protocol):
    """Decides, from the state as it was read, what it is to become; None to leave it. May be asked again."""

    def __call__(self, state: LiveState, now: float) -> tuple[LiveState, Change] | None: ...


class RangeStore(PublishedRangeSets):
    """The store of one served model (DESIGN "The store"); may be used from any thread.

    Every change of the live state is one atomic step: it makes a generation, an audit entry and a hint, or nothing.
    `if_match` guards a change: the generation that the caller read. Without it, a change is tried until it succeeds.
    `request` names what asked for a change, so that `has_change_for` finds it.
    Every method raises StoreUnavailable if Redis cannot be reached or refuses.
    """

    def __init__(self, client: redis.Redis, model: str) -> None:
        super().__init__(client, model)
        self._change_live = client.register_script(CHANGE_LIVE)
        self._resolver: RangeSet | None = None
        self.replicas = ReplicaRegistry(client, model)
        """Which processes answer for the model, and under which generation."""
        self.clock = StoreClock()
        """The time by which erasures expire."""
        self.guard: Guard | None = None
        """What a server lets look at the live state before every change that it makes; see `Mirror.before_change`."""

    def peek(self) -> LiveState | None:
        """The live state, or None where there is none: never written, or Redis was emptied.

        Raises:
            InvalidRangeSet: it is unreadable.
        """
        return self._read()[1]

    def live(self) -> LiveState:
        """The live state; an empty one, in an epoch of its own, is created where there is none."""
        _, state = self._read()
        while state is None:
            created = initial_state()
            change = Change(action="create", before=None, after=created.generation, range_set=None)
            self._write(b"", created, [change])
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
            NoRangeSet: nothing is active that the erasures could be resolved on.
            InvalidErasure, UnknownConcept, NotFitted: one cannot be resolved on the active range set.
        """
        check_distinct_concepts([each.concept for each in erasures])

        def replace(state: LiveState, now: float) -> tuple[LiveState, Change]:
            self._check_resolvable(state, erasures)
            after = state.next_generation(state.range_set, tuple(erasures))
            concepts = {each.concept for each in (*state.erasures, *erasures)}
            return after, _change("replace", state, after, concepts, by, reason)

        return self._change(replace, if_match, request=request)

    def set_erasure(self, erasure: LiveErasure, if_match: str | None = None, request: str | None = None) -> LiveState:
        """Switch one erasure on, or change it; the audit names its `by` and `reason`.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            NoRangeSet: nothing is active that the erasure could be resolved on.
            InvalidErasure, UnknownConcept, NotFitted: it cannot be resolved on the active range set.
        """

        def switch_on(state: LiveState, now: float) -> tuple[LiveState, Change]:
            self._check_resolvable(state, [erasure])
            others = tuple(each for each in state.erasures if each.concept != erasure.concept)
            after = state.next_generation(state.range_set, (*others, erasure))
            return after, _change("set", state, after, [erasure.concept], erasure.by, erasure.reason)

        return self._change(switch_on, if_match, request=request)

    def remove_erasure(
        self,
        concept: str,
        if_match: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        request: str | None = None,
    ) -> LiveState:
        """Switch the erasure of one concept off. Where it is off already, nothing changes and no generation is made.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            UnknownConcept: it is not erased, and the active range set knows no such concept.
        """

        def switch_off(state: LiveState, now: float) -> tuple[LiveState, Change] | None:
            others = tuple(each for each in state.erasures if each.concept != concept)
            if len(others) == len(state.erasures):
                known = self.provenance(state.range_set).concepts if state.range_set else ()
                if concept not in known:
                    raise UnknownConcept(concept, known)
                return None
            after = state.next_generation(state.range_set, others)
            return after, _change("remove", state, after, [concept], by, reason)

        return self._change(switch_off, if_match, request=request)

    def activate(
        self,
        range_set: str,
        force: bool = False,
        if_match: str | None = None,
        by: str | None = None,
        reason: str | None = None,
        request: str | None = None,
    ) -> LiveState:
        """Make a published range set the one that erasures are resolved on.

        Args:
            force: drop live erasures that cannot be resolved on it, but for enforced ones; the audit names them.

        Raises:
            UnknownRangeSet: none of that id is published.
            InvalidRangeSet: it is corrupt.
            UnresolvableErasure: a live erasure cannot be resolved on it, and `force` is not set, or it is enforced.
            StaleGeneration: the state is not at `if_match`.
        """
        candidate = self.read(range_set)

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
                    + (" first, since they are enforced" if enforced else ", or use force to drop them")
                )
            kept = tuple(each for each in state.erasures if each.concept not in why)
            after = state.next_generation(range_set, kept)
            change = _change("activate", state, after, (), by, reason)
            return after, change.model_copy(update={"dropped": tuple(sorted(why))})

        state = self._change(switch, if_match, activates=True, request=request)
        self._resolver = candidate
        return state

    def restored(self, held: LiveState, state: LiveState | None) -> LiveState | None:
        """What the live state is to be where `state`, as Redis has it now, knows less than `held`, which it had before.

        Redis was emptied, or an older copy of it came back. What was held is restored in a new epoch, so that no
        generation names two states, but for what operators did since. They decide on the concepts that they name; on
        all that are not enforced, if they replaced all erasures; and on the range set, if they activated one. Nobody
        drops an enforced erasure who does not name it.

        Returns:
            The state to put back; None if `state` knows all of `held`.
        """
        now = self.clock.now()
        erasures = held.at(now)
        if state is None:
            return new_epoch([held], held.range_set, erasures)
        if state == held or (state.is_at_least(held.generation) and state.generation != held.generation):
            return None
        if held.is_at_least(state.generation):  # an older copy, or one that went another way since
            return new_epoch([held, state], held.range_set, erasures)
        since = self._changes_since(held, state)
        named = {concept for change in since for concept in (*change.concepts, *change.dropped)}
        replaced = any(change.action == "replace" for change in since)
        older = any(held.is_at_least(generation) for generation in state.continues)
        theirs = {each.concept: each for each in state.at(now)}
        ours = {each.concept: each for each in erasures if each.enforced or not replaced}
        kept = {concept: each for concept, each in theirs.items() if concept in named or not older}
        merged = kept | {concept: each for concept, each in ours.items() if concept not in named}
        activated = any(change.action == "activate" for change in since)
        range_set = state.range_set if state.range_set and (activated or not older) else held.range_set
        after = new_epoch([held, state], range_set, tuple(merged.values()))
        return None if (range_set, after.erasures) == (state.range_set, state.at(now)) else after

    def put_back(self, held: LiveState) -> tuple[LiveState, bool]:
        """Make what Redis has forgotten of `held` live again, in one step.

        Returns:
            The live state, and whether it was put back by this call: not if Redis, or another server, knew it all.

        Raises:
            UnknownRangeSet: the range set is not published any more.
            UnknownConcept, NotFitted: the range set that was activated since cannot serve the erasures.
        """
        for attempt in range(ATTEMPTS):
            raw, state = self._read()
            after = self.restored(held, state)
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
                reason=f"Redis had forgotten generation {held.generation}",
            )
            if self._write(raw, after, [change]):
                return after, True
            _pause(attempt)
        raise self._too_fast()

    def _changes_since(self, held: LiveState, state: LiveState) -> list[AuditEntry]:
        """What operators changed after `held` and up to `state`, as far as the audit tells."""
        since = []
        for entry in self.audit(AUDIT_LENGTH):
            if entry.after != state.generation and is_at_least(entry.after, state.generation):
                continue  # made after the state was read, as by another server that puts back
            if held.is_at_least(entry.after):
                break
            if entry.action in ("set", "remove", "replace", "activate"):
                since.append(entry)
        return since

    def expire(self, now: float) -> LiveState | None:
        """Take out what has expired at Unix time `now`, as a generation of its own; None where there is no state."""
        if self.peek() is None:
            return None
        return self._change(lambda state, _: None, None, now)

    def audit(self, limit: int = 100) -> Sequence[AuditEntry]:
        """The last `limit` changes of the live state, newest first.

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
        """Whether one of the last changes was made for that `request`."""
        with translate_redis_errors():
            stored: Any = self.client.xrevrange(self.keys.audit, count=RECENT)
        return any(fields.get(b"request") == request.encode() for _, fields in stored)

    def _change(
        self,
        decide: _Decision,
        if_match: str | None,
        now: float | None = None,
        *,
        activates: bool = False,
        request: str | None = None,
    ) -> LiveState:
        """Read, decide, compare and set, until it succeeds. Expired erasures go first, as a generation of their own."""
        for attempt in range(ATTEMPTS):
            raw, state = self._read()
            if self.guard is not None and self.guard(state, activates):
                continue
            if state is None:
                self.live()
                continue
            if if_match is not None and if_match != state.generation:
                raise StaleGeneration(if_match, state.generation)
            at = self.clock.now() if now is None else now
            changes = []
            unexpired = state.at(at)
            if len(unexpired) < len(state.erasures):
                expired = {each.concept for each in state.erasures if each.expired(at)}
                before, state = state, state.next_generation(state.range_set, unexpired)
                changes.append(_change("expire", before, state, expired, None, None))
            if decided := decide(state, at):
                state, change = decided
                changes.append(change)
            if not changes or self._write(raw, state, changes, request):
                return state
            _pause(attempt)
        raise self._too_fast()

    def _too_fast(self) -> StoreUnavailable:
        return StoreUnavailable(f"the live state of {self.model!r} changes too fast: try again")

    def _read(self) -> tuple[bytes, LiveState | None]:
        raw = self.clock.get(self.client, self.keys.live)
        if raw is None:
            return b"", None
        try:
            return raw, LiveState.model_validate_json(raw)
        except ValidationError:
            raise InvalidRangeSet(
                f"the live state of {self.model!r} is unreadable: written by something else, or by a newer version?"
            ) from None

    def _write(self, expected: bytes, state: LiveState, changes: Iterable[Change], request: str | None = None) -> bool:
        """Whether the state was still as expected, and is now `state`.

        Raises:
            UnknownRangeSet: the range set to activate is no longer published.
        """
        activated = any(change.action in ("activate", "restore") for change in changes)
        arguments: list[bytes | str | int] = [
            expected,
            state.model_dump_json(),
            (state.range_set or "") if activated else "",
            CHANGES,
            self.hint(),
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
            raise NoRangeSet("no range set is active: fit one with `neuronlens fit … --activate`")
        if self._resolver is None or self._resolver.id != state.range_set:
            self._resolver = self.read(state.range_set)
        resolver = self._resolver
        resolve(resolver, [each.erasure for each in erasures])

    def _active_id(self) -> str | None:
        state = self.peek()
        return state.range_set if state else None


def _unresolvable(range_set: RangeSet, live: LiveErasure) -> str | None:
    """Why an erasure cannot be resolved on a range set, or None if it can."""
    try:
        resolve(range_set, [live.erasure])
    except RangeStoreError as error:
        return str(error)
    return None


def _pause(attempt: int) -> None:
    """Wait a moment, the longer the more tries there were, while others change the same live state."""
    time.sleep(random.uniform(0, 0.001 * min(attempt, 20)))


def _change(
    action: str, before: LiveState, after: LiveState, concepts: Iterable[str], by: str | None, reason: str | None
) -> Change:
    return Change.model_validate(
        {
            "action": action,
            "before": before.generation,
            "after": after.generation,
            "range_set": after.range_set,
            "concepts": tuple(sorted(concepts)),
            "by": by,
            "reason": reason,
        }
    )
