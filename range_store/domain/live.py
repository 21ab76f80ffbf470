"""The live state: the erasures that apply to requests that name none, versioned by a generation."""

import secrets
import time
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from range_store.domain.erasure import Erasure, FrozenModel, check_distinct_concepts
from range_store.errors import InvalidErasure

Generation = Annotated[str, Field(pattern=r"^[0-9a-f]{8}-(0|[1-9][0-9]*)$")]
"""`epoch-counter`. The epoch is random, so a Redis that was emptied never repeats a generation."""

Action = Literal["create", "set", "remove", "replace", "activate", "expire", "restore"]
"""What changed the live state. `restore`: a server restored what Redis had lost."""

MAX_CONTINUED = 16
"""Earlier epochs that a state lists. A server that missed more restores counts as one with newer knowledge."""


def is_at_least(generation: str, minimum: str) -> bool:
    """Whether `generation` is `minimum` or a later one of the same epoch. Generations of two epochs have no order."""
    (epoch, counter), (min_epoch, min_counter) = generation.split("-"), minimum.split("-")
    return epoch == min_epoch and int(counter) >= int(min_counter)


class LiveErasure(FrozenModel):
    """An erasure that an operator switched on.

    `enforced`: added to every plan, whatever the request says. `expires_at`, `since`: Unix seconds. `by`: the operator.
    """

    erasure: Erasure
    enforced: bool = False
    reason: str | None = None
    expires_at: float | None = None
    since: float = Field(default_factory=time.time)
    by: str | None = None

    @property
    def concept(self) -> str:
        return self.erasure.concept

    def expired(self, now: float) -> bool:
        """Whether it no longer applies at Unix time `now`."""
        return self.expires_at is not None and self.expires_at <= now


class LiveState(FrozenModel):
    """The active range set and the live erasures of one model, sorted by concept."""

    generation: Generation
    range_set: str | None
    erasures: tuple[LiveErasure, ...]
    continues: tuple[Generation, ...] = ()
    """The last generations of earlier epochs that this epoch continues after Redis had lost them, newest first."""

    @field_validator("erasures")
    @classmethod
    def _sorted_by_concept(cls, erasures: tuple[LiveErasure, ...]) -> tuple[LiveErasure, ...]:
        try:
            check_distinct_concepts([each.concept for each in erasures])
        except InvalidErasure as error:
            raise ValueError(str(error)) from None
        return tuple(sorted(erasures, key=lambda each: each.concept))

    @property
    def epoch(self) -> str:
        return self.generation.split("-")[0]

    @property
    def counter(self) -> int:
        return int(self.generation.split("-")[1])

    def is_at_least(self, generation: str) -> bool:
        """Whether this is `generation`, or a later one of its epoch or of an epoch that continues it."""
        return any(is_at_least(each, generation) for each in (self.generation, *self.continues))

    def active_at(self, now: float) -> tuple[LiveErasure, ...]:
        """Return the erasures that apply at Unix time `now`. They expire on time even while Redis is away."""
        return tuple(each for each in self.erasures if not each.expired(now))

    @property
    def next_expiry(self) -> float | None:
        """Unix time at which the next erasure expires."""
        return min((each.expires_at for each in self.erasures if each.expires_at is not None), default=None)

    def next_generation(self, range_set: str | None, erasures: tuple[LiveErasure, ...]) -> "LiveState":
        """Return the next generation, with that range set and those erasures."""
        generation = f"{self.epoch}-{self.counter + 1}"
        return LiveState(generation=generation, range_set=range_set, erasures=erasures, continues=self.continues)


def initial_state() -> LiveState:
    """Return a state without range set and erasures, in a new epoch."""
    return LiveState(generation=f"{secrets.token_hex(4)}-0", range_set=None, erasures=())


def new_epoch(states: Iterable[LiveState], range_set: str | None, erasures: tuple[LiveErasure, ...]) -> LiveState:
    """Return the first generation of a new epoch that continues `states`, given newest first."""
    continues: dict[str, str] = {}
    for generation in (each for state in states for each in (state.generation, *state.continues)):
        epoch = generation.split("-")[0]
        if epoch not in continues or is_at_least(generation, continues[epoch]):
            continues[epoch] = generation
    return LiveState(
        generation=f"{secrets.token_hex(4)}-1",
        range_set=range_set,
        erasures=erasures,
        continues=tuple(continues.values())[:MAX_CONTINUED],
    )


class Change(FrozenModel):
    """One change, as the audit keeps it. It never contains texts of users.

    `concepts`: the concepts that the change names. `dropped`: erasures that a forced activation removed.
    `before`: None where the live state was created.
    """

    action: Action
    before: Generation | None
    after: Generation
    range_set: str | None
    concepts: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    by: str | None = None
    reason: str | None = None


class AuditEntry(Change):
    """A stored change. `id`: its position in the stream. `at`: Unix time by Redis's clock."""

    id: str
    at: float
