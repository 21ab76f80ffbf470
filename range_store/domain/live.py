"""The live state: which erasures apply to requests that name none, versioned by a generation."""

import secrets
import time
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from range_store.domain.erasure import Erasure, FrozenModel, check_distinct_concepts
from range_store.errors import InvalidErasure

Generation = Annotated[str, Field(pattern=r"^[0-9a-f]{8}-(0|[1-9][0-9]*)$")]
"""`epoch-counter`: the epoch is random where the state is created, so an emptied Redis never repeats a generation."""


def is_at_least(generation: str, wanted: str) -> bool:
    """Whether `generation` is `wanted` or a later one of the same epoch; of two epochs neither is the later one."""
    (epoch, counter), (wanted_epoch, wanted_counter) = generation.split("-"), wanted.split("-")
    return epoch == wanted_epoch and int(counter) >= int(wanted_counter)


Action = Literal["create", "set", "remove", "replace", "activate", "expire", "restore"]
"""`restore`: a server put back what Redis had forgotten."""


class LiveErasure(FrozenModel):
    """An erasure that an operator switched on.

    `enforced`: joined to every plan, whatever the request says. `expires_at`, `since`: Unix seconds. `by`: who did it.
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
    """Active range set and live erasures, sorted by concept name, of one model."""

    generation: Generation
    range_set: str | None
    erasures: tuple[LiveErasure, ...]
    continues: tuple[Generation, ...] = ()
    """The generations of earlier epochs that this epoch took over after Redis had forgotten them, newest first."""

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
        """Whether this is that generation, or a later one of the same epoch or of one that continues it."""
        return any(is_at_least(each, generation) for each in (self.generation, *self.continues))

    def at(self, now: float) -> tuple[LiveErasure, ...]:
        """The erasures that apply at Unix time `now`: expiry is obeyed even while Redis is away."""
        return tuple(each for each in self.erasures if not each.expired(now))

    @property
    def next_expiry(self) -> float | None:
        """Unix time at which the next erasure expires."""
        return min((each.expires_at for each in self.erasures if each.expires_at is not None), default=None)

    def next_generation(self, range_set: str | None, erasures: tuple[LiveErasure, ...]) -> "LiveState":
        """The next generation, with that range set and those erasures."""
        generation = f"{self.epoch}-{self.counter + 1}"
        return LiveState(generation=generation, range_set=range_set, erasures=erasures, continues=self.continues)


MOST_CONTINUED = 16
"""Earlier epochs that a state remembers; a server that missed more restores is taken for one that knows something."""


def new_epoch(states: Iterable[LiveState], range_set: str | None, erasures: tuple[LiveErasure, ...]) -> LiveState:
    """The first generation of a new epoch that takes over what these states were, the newest first."""
    continues: dict[str, str] = {}
    for generation in (each for state in states for each in (state.generation, *state.continues)):
        epoch = generation.split("-")[0]
        if epoch not in continues or is_at_least(generation, continues[epoch]):
            continues[epoch] = generation
    return LiveState(
        generation=f"{secrets.token_hex(4)}-1",
        range_set=range_set,
        erasures=erasures,
        continues=tuple(continues.values())[:MOST_CONTINUED],
    )


def initial_state() -> LiveState:
    """Nothing active, nothing erased, in an epoch of its own."""
    return LiveState(generation=f"{secrets.token_hex(4)}-0", range_set=None, erasures=())


class Change(FrozenModel):
    """What the audit keeps of one change. Texts of users are never part of it.

    `concepts`: those that the change was about. `dropped`: erasures that a forced activation took out.
    `before` is None where the live state was created.
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
    """A change as read back: `id` is its place in the stream, `at` the Unix time by Redis's clock."""

    id: str
    at: float
