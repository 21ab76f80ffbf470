"""`RangeStore`: the range sets of one served model, its live erasures, and the audit of who changed them."""

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import redis
from pydantic import ValidationError

from range_store.codec import assemble
from range_store.erasure import check_distinct
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
from range_store.failures import reaching_redis
from range_store.keys import CHANGES
from range_store.live import AuditEntry, Change, LiveErasure, LiveState, new_state
from range_store.plan import resolve
from range_store.published import Published, PublishedRangeSets
from range_store.range_set import RangeSet
from range_store.replicas import Replicas
from range_store.scripts import CHANGE_LIVE

__all__ = ["Published", "RangeStore", "assemble"]

LATER = 100
"""How many changes made after a state was read may stand before its own in the audit."""
AUDIT_LENGTH = 10_000
ATTEMPTS = 200
"""Tries of a change while others change the same live state; each failed one means that another succeeded."""


class _Decision(Protocol):
    """Decides, from the state as it was read, what it is to become; None to leave it. May be asked again."""

    def __call__(self, state: LiveState, now: float) -> tuple[LiveState, Change] | None: ...


class RangeStore(PublishedRangeSets):
    """The store of one served model (DESIGN "The store"); may be used from any thread.

    Every change of the live state is one atomic step: it makes a generation, an audit entry and a hint, or nothing.
    `if_match` guards a change: the generation that the caller read. Without it, a change is tried until it succeeds.
    Every method raises StoreUnavailable if Redis cannot be reached or refuses.
    """

    def __init__(self, client: redis.Redis, model: str) -> None:
        super().__init__(client, model)
        self._change_live = client.register_script(CHANGE_LIVE)
        self._resolver: RangeSet | None = None
        self.replicas = Replicas(client, model)
        """Which processes answer for the model, and under which generation."""

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
            created = new_state()
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
    ) -> LiveState:
        """Replace all live erasures in one generation.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            NoRangeSet: nothing is active that the erasures could be resolved on.
            InvalidErasure, UnknownConcept, NotFitted: one cannot be resolved on the active range set.
        """
        check_distinct([each.concept for each in erasures])

        def replace(state: LiveState, now: float) -> tuple[LiveState, Change]:
            self._check_resolvable(state, erasures)
            after = state.advanced(state.range_set, tuple(erasures))
            concepts = {each.concept for each in (*state.erasures, *erasures)}
            return after, _change("replace", state, after, concepts, by, reason)

        return self._change(replace, if_match)

    def set_erasure(self, erasure: LiveErasure, if_match: str | None = None) -> LiveState:
        """Switch one erasure on, or change it; the audit names its `by` and `reason`.

        Raises:
            StaleGeneration: the state is not at `if_match`.
            NoRangeSet: nothing is active that the erasure could be resolved on.
            InvalidErasure, UnknownConcept, NotFitted: it cannot be resolved on the active range set.
        """

        def switch_on(state: LiveState, now: float) -> tuple[LiveState, Change]:
            self._check_resolvable(state, [erasure])
            others = tuple(each for each in state.erasures if each.concept != erasure.concept)
            after = state.advanced(state.range_set, (*others, erasure))
            return after, _change("set", state, after, [erasure.concept], erasure.by, erasure.reason)

        return self._change(switch_on, if_match)

    def remove_erasure(
        self, concept: str, if_match: str | None = None, by: str | None = None, reason: str | None = None
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
            after = state.advanced(state.range_set, others)
            return after, _change("remove", state, after, [concept], by, reason)

        return self._change(switch_off, if_match)

    def activate(
        self,
        range_set: str,
        force: bool = False,
        if_match: str | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> LiveState:
        """Make a published range set the one that erasures are resolved on.

        Args:
            force: drop live erasures that cannot be resolved on it; the audit names them.

        Raises:
            UnknownRangeSet: none of that id is published.
            InvalidRangeSet: it is corrupt.
            UnresolvableErasure: a live erasure cannot be resolved on it, and `force` is not set.
            StaleGeneration: the state is not at `if_match`.
        """
        candidate = self.read(range_set)

        def switch(state: LiveState, now: float) -> tuple[LiveState, Change]:
            why = {each.concept: why for each in state.erasures if (why := _unresolvable(candidate, each))}
            if why and not force:
                raise UnresolvableErasure(
                    f"range set {range_set} cannot serve the live erasures of {', '.join(map(repr, why))} "
                    f"({'; '.join(why.values())}): switch them off, or use force to drop them"
                )
            kept = tuple(each for each in state.erasures if each.concept not in why)
            after = state.advanced(range_set, kept)
            change = _change("activate", state, after, (), by, reason)
            return after, change.model_copy(update={"dropped": tuple(sorted(why))})

        state = self._change(switch, if_match)
        self._resolver = candidate
        return state

    def has_forgotten(self, held: LiveState, state: LiveState | None) -> bool:
        """Whether `state`, as Redis has it now, knows less than `held`, which it had before.

        It was emptied, an older copy came back, or it was begun anew since and nobody has yet decided there on what
        is to be erased: activating a range set is no such decision.
        """
        if state is None:
            return True
        if state.epoch == held.epoch:
            return state.counter < held.counter
        if state.counter == 0:
            return held.range_set is not None or bool(held.erasures)
        return bool(held.erasures) and not self._erasures_decided(state)

    def put_back(self, held: LiveState) -> LiveState:
        """Make what Redis has forgotten of `held` live again, in one step; leaves a state that has not forgotten it.

        What was begun anew keeps its epoch, and the range set that was activated in it.

        Raises:
            UnknownRangeSet: the range set is not published any more.
            UnknownConcept, NotFitted: the range set that was activated since cannot serve the erasures.
        """

        def restore(state: LiveState, now: float) -> tuple[LiveState, Change] | None:
            if not self.has_forgotten(held, state):
                return None
            same, erasures = state.epoch == held.epoch, held.at(now)
            range_set = held.range_set if same or state.range_set is None else state.range_set
            after = (held if same else state).advanced(range_set, erasures)
            self._check_resolvable(after, erasures)
            reason = f"Redis had forgotten generation {held.generation}"
            concepts = {each.concept for each in erasures}
            return after, _change("restore", state, after, concepts, "server", reason)

        return self._change(restore, None)

    def _erasures_decided(self, state: LiveState) -> bool:
        """Whether the audit of the state's epoch names an erasure; yes if it does not reach back to its beginning."""
        for entry in self.audit(min(state.counter + 1 + LATER, AUDIT_LENGTH)):
            epoch, counter = entry.after.split("-")
            if epoch == state.epoch and int(counter) > state.counter:
                continue  # made since the state was read, as by another server that puts back: it tells nothing of it
            if epoch != state.epoch or entry.action not in ("create", "activate"):
                return True
            if entry.action == "create":
                return False
        return True

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
        with reaching_redis():
            stored: Any = self.client.xrevrange(self.keys.audit, count=max(limit, 1))
        entries = []
        for id_, fields in stored:
            try:
                change = Change.model_validate_json(fields[b"change"])
            except (ValidationError, KeyError):
                raise InvalidRangeSet(f"entry {id_.decode()} of the audit of {self.model!r} is unreadable") from None
            entries.append(AuditEntry(id=id_.decode(), at=int(id_.split(b"-")[0]) / 1000, **change.model_dump()))
        return entries

    def _change(self, decide: _Decision, if_match: str | None, now: float | None = None) -> LiveState:
        """Read, decide, compare and set, until it succeeds. Expired erasures go first, as a generation of their own."""
        for attempt in range(ATTEMPTS):
            at = time.time() if now is None else now
            raw, state = self._read()
            if state is None:
                self.live()
                continue
            if if_match is not None and if_match != state.generation:
                raise StaleGeneration(if_match, state.generation)
            changes = []
            unexpired = state.at(at)
            if len(unexpired) < len(state.erasures):
                expired = {each.concept for each in state.erasures if each.expired(at)}
                before, state = state, state.advanced(state.range_set, unexpired)
                changes.append(_change("expire", before, state, expired, None, None))
            if decided := decide(state, at):
                state, change = decided
                changes.append(change)
            if not changes or self._write(raw, state, changes):
                return state
            time.sleep(random.uniform(0, 0.001 * min(attempt, 20)))
        raise StoreUnavailable(f"the live state of {self.model!r} changes too fast: try again")

    def _read(self) -> tuple[bytes, LiveState | None]:
        with reaching_redis():
            raw: Any = self.client.get(self.keys.live)
        if raw is None:
            return b"", None
        try:
            return raw, LiveState.model_validate_json(raw)
        except ValidationError:
            raise InvalidRangeSet(
                f"the live state of {self.model!r} is unreadable: written by something else, or by a newer version?"
            ) from None

    def _write(self, expected: bytes, state: LiveState, changes: Iterable[Change]) -> bool:
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
            *(change.model_dump_json() for change in changes),
        ]
        with reaching_redis():
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
