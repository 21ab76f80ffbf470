"""Admission: the moment at which a request's plan is frozen."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from range_store.domain.erasure import Erasure
from range_store.domain.plan import NO_ERASURE, Plan, resolve
from range_store.domain.range_set import RangeSet
from range_store.errors import EnforcedErasure, NoRangeSet, StoreUnavailable
from range_store.storage.mirror import Mirror
from workers.engine.answers import Source
from workers.engine.generation_wait import GenerationWait


@dataclass(frozen=True, eq=False)
class Admission:
    """The plan and live state that a request was admitted with.

    Attributes:
        plan: everything that is erased. guard: the enforced erasures alone; None where the plan holds nothing else.
        enforced: the concepts that an operator enforces.
    """

    source: Source
    plan: Plan
    guard: Plan | None
    enforced: frozenset[str]
    range_set: str | None
    generation: str


class Planner:
    """Resolves erasures to plans against the mirror's snapshot, and keeps the plans.

    Args:
        capacity: largest size in bytes of the plans kept, the least recently used evicted first. A request keeps its
            plan, evicted or not.
    """

    def __init__(self, mirror: Mirror, capacity: int) -> None:
        self._mirror = mirror
        self._generation_wait = GenerationWait(mirror)
        self._capacity = capacity
        self._bytes = 0
        self._plans: OrderedDict[tuple[str, tuple[Erasure, ...]], Plan] = OrderedDict()

    async def admit(
        self, erase: Sequence[Erasure] | None, min_generation: str | None = None, timeout: float | None = None
    ) -> Admission:
        """The plan of a request that names the erasures `erase`, or of one that gets the live erasures, with None.

        Enforced live erasures join every plan, and come first in it, so that their replacement counts. Those of a
        request act at the last enforced block or above it: below, they would change the values by which an enforced
        erasure decides what to mask. Operators may erase anywhere.

        Args:
            min_generation: of the live state, even if `erase` names the erasures; a later one of its epoch will do.
            timeout: seconds that the request has, of which it may wait for that generation.

        Raises:
            GenerationNotReached: the live state did not reach `min_generation` in time.
            StoreUnavailable: the live erasures were never read, so it is unknown what must be erased.
            NoRangeSet: something is to be erased, and no range set is active.
            EnforcedErasure: an erasure of the request acts below an enforced one.
            InvalidErasure, UnknownConcept, NotFitted: see `range_store.domain.plan.resolve`.
        """
        await self._generation_wait.reach(min_generation, timeout)
        snapshot = self._mirror.snapshot
        if snapshot is None:
            raise StoreUnavailable("the live erasures were never read: the store cannot be reached")
        live = snapshot.live.active_at(self._mirror.now())
        enforced = [entry.erasure for entry in live if entry.enforced]
        names = frozenset(erasure.concept for erasure in enforced)
        requested = [entry.erasure for entry in live] if erase is None else erase
        others = [erasure for erasure in requested if erasure.concept not in names]
        erasures = enforced + others
        source: Source = "none" if not erasures else "request" if erase else "live"
        plan = await self._plan(snapshot.range_set, tuple(erasures))
        if erase is not None:
            _check_order(plan.erasures[: len(enforced)], plan.erasures[len(enforced) :])
        guard = await self._plan(snapshot.range_set, tuple(enforced)) if enforced and others else None
        range_set = snapshot.range_set.id if snapshot.range_set else None
        return Admission(source, plan, guard, names, range_set, snapshot.live.generation)

    async def _plan(self, range_set: RangeSet | None, erasures: tuple[Erasure, ...]) -> Plan:
        if not erasures:
            return NO_ERASURE
        if range_set is None:
            raise NoRangeSet()
        key = (range_set.id, erasures)
        plan = self._plans.get(key)
        if plan is None:
            plan = await asyncio.to_thread(resolve, range_set, erasures)
            if key not in self._plans:  # another request may have added it meanwhile
                self._plans[key] = plan
                self._bytes += plan.nbytes
            while self._bytes > self._capacity:
                self._bytes -= self._plans.popitem(last=False)[1].nbytes
        else:
            self._plans.move_to_end(key)
        return plan


def _check_order(enforced: Sequence[Erasure], requested: Sequence[Erasure]) -> None:
    """Refuse an erasure of a request below the last enforced block; layers are resolved.

    Raises:
        EnforcedErasure: there is one.
    """
    last, protected = max(((_blocks(erasure)[-1], erasure.concept) for erasure in enforced), default=(0, ""))
    for erasure in requested:
        if (first := _blocks(erasure)[0]) < last:
            raise EnforcedErasure(
                f"the erasure of {erasure.concept!r} at block {first} would change what the enforced erasure of "
                f"{protected!r} at block {last} sees: erase at block {last} or above"
            )


def _blocks(erasure: Erasure) -> tuple[int, ...]:
    """Block indices of an erasure of a plan, ascending."""
    assert not isinstance(erasure.layers, str)
    return erasure.layers
