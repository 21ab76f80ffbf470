"""What the replicas of a model report to Redis: which generation each of them answers under.

A replica announces itself before its first read of the live state, reports whenever its generation changes, and renews
its report every second; by Redis's own clock a report holds for ten. So who changes the live state and then reads the
roster can tell who does not follow yet: whoever is not in it reads the live state before it answers anything.
"""

import json
import os
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

import redis
from pydantic import BaseModel, ConfigDict, Field, field_validator

from range_store.domain.live import Generation, is_at_least
from range_store.redis_errors import translate_redis_errors
from range_store.storage.keys import ModelKeys
from range_store.storage.scripts import REPORT

HEARTBEAT_SECONDS = 1.0
"""Time between two reports of a replica whose generation stays."""
SILENT_SECONDS = 3.5
"""A replica that could not report for so long reads the live state before it admits a request; so long a new roster may
lack somebody. More than a heartbeat and the time that a Redis which hangs is waited for."""
LEASE_SECONDS = 10.0
"""How long a report holds that is not renewed: a replica that was killed is forgotten after that."""
NAMED = 5
"""Most replicas that a sentence names."""
SINCE = b"since"
"""Field of the hash that is no replica's: when the hash was begun, in Unix seconds by Redis's clock."""

Name = Annotated[str, Field(pattern=r"^\S{1,300}$")]
ADDRESS = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")


class ReplicaStatus(BaseModel):
    """What one replica reported; a newer version may say more. Times are Unix seconds by Redis's clock.

    `name`: `host:process:random`, unique. `generation`: what it answers under; None while it has not read any.
    `expires`: when it is forgotten. `metrics`: `host:port` where it serves its own; None if it does not. `dtype`: type
    of its model's parameters.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    name: Name
    generation: Generation | None
    range_set: str | None
    at: float
    expires: float
    metrics: str | None = None
    dtype: str | None = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _text_or_none(cls, value: object) -> str | None:
        return value if isinstance(value, str) else None

    @field_validator("metrics", mode="before")
    @classmethod
    def _address_or_none(cls, value: object) -> str | None:
        """What is no address is left out, and the replica is not: others wait for it."""
        return value if isinstance(value, str) and ADDRESS.fullmatch(value) else None

    @property
    def host(self) -> str:
        """The machine or container that it runs on."""
        return self.name.split(":")[0]


@dataclass(frozen=True)
class Roster:
    """The live replicas by name, as Redis had them at Unix time `now`; `since`: when the first of them reported.

    `since` is None where nobody ever reported, or Redis was emptied.
    """

    now: float
    since: float | None
    replicas: tuple[ReplicaStatus, ...]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types that the model is served in; of an older version it is not known."""
        return tuple(sorted({each.dtype for each in self.replicas if each.dtype is not None}))

    def missing(self, generation: str) -> tuple[str, ...]:
        """Names of those that do not report that generation or a later one of its epoch."""
        return tuple(
            each.name
            for each in self.replicas
            if each.generation is None or not is_at_least(each.generation, generation)
        )


class ReplicaRegistry:
    """The reports of one model's replicas. Each method costs one round trip, and may be called from any thread.

    Raises StoreUnavailable if Redis cannot be reached or refuses.
    """

    def __init__(self, client: redis.Redis, model: str) -> None:
        self._client = client
        self._key = ModelKeys(model).replicas
        self._report = client.register_script(REPORT)

    def report(
        self,
        name: str,
        generation: str | None,
        range_set: str | None,
        seconds: float = LEASE_SECONDS,
        metrics: str | None = None,
        dtype: str | None = None,
    ) -> int:
        """A replica answers under that generation; holds for `seconds`. Gives how many report now."""
        with translate_redis_errors():
            told: list[str | float] = [name, generation or "", range_set or "", seconds, metrics or "", dtype or ""]
            return cast(int, self._report([self._key], told))

    def remove(self, name: str) -> None:
        """A replica takes no requests any more."""
        with translate_redis_errors():
            self._client.hdel(self._key, name)

    def forget(self, ended: str) -> bool:
        """Take out the reports of a replica whose process has ended, by the last part of its name.

        Not before it has missed a heartbeat: who was taken for ended and lives reports on. Gives whether none is left.
        """
        roster = self.read()
        held = [each for each in roster.replicas if each.name.endswith(f":{ended}")]
        silent = [each.name for each in held if roster.now - each.at > 1.5 * HEARTBEAT_SECONDS]
        for name in silent:
            self.remove(name)
        return len(silent) == len(held)

    def read(self) -> Roster:
        """Who reports now. What was written by something else is left out."""
        with translate_redis_errors(), self._client.pipeline(transaction=False) as both:
            both.time()
            both.hgetall(self._key)
            (seconds, microseconds), held = both.execute()
        now = seconds + microseconds / 1e6
        found = []
        for name, report in held.items():
            try:
                replica = ReplicaStatus.model_validate({**json.loads(report), "name": name.decode()})
            except (ValueError, TypeError, RecursionError):
                continue
            if replica.expires > now:
                found.append(replica)
        since = float(held[SINCE]) if re.fullmatch(rb"[0-9]+(\.[0-9]+)?", held.get(SINCE, b"")) else None
        return Roster(now, since, tuple(sorted(found, key=lambda each: each.name)))


class ReplicaWait:
    """Whether every replica follows a generation, told over several looks at the roster.

    Args:
        own: name of a replica that must be among them, though it may have failed to report; asked at every look.
    """

    def __init__(self, generation: str, own: Callable[[], str | None] = lambda: None) -> None:
        self.generation = generation
        self.missing: tuple[str, ...] = ()
        """Who did not follow yet at the last look."""
        self.replicas = 0
        """How many there were."""
        self.settled = False
        """Whether all who live must have been in the roster: where Redis was emptied, each has to report anew."""
        self._own = own
        self._empty_since: float | None = None

    def done(self, roster: Roster) -> bool:
        """Whether all follow. None at all is all too, once it is certain that nobody lives."""
        if roster.since is not None:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = roster.now
        since = roster.since if self._empty_since is None else self._empty_since
        self.settled = since is not None and roster.now - since >= SILENT_SECONDS
        own, names = self._own(), {each.name for each in roster.replicas}
        silent = () if own is None or own in names else (own,)
        self.missing = (*roster.missing(self.generation), *silent)
        self.replicas = len(names) + len(silent)
        return self.settled and not self.missing

    def why(self) -> str:
        """What was lacking at the last look, in words."""
        if self.missing:
            named = ", ".join(self.missing[:NAMED]) + (", …" if len(self.missing) > NAMED else "")
            return f"{len(self.missing)} of {self.replicas} replicas do not report it yet ({named})"
        return "the replicas began to report only now (was Redis emptied?), and some may be missing among them"


def new_replica_name(unique: str | None = None) -> str:
    """A name for a replica in this process; `unique`: its last part, else random."""
    host = re.sub(r"[\s:]", "-", socket.gethostname()) or "localhost"
    return f"{host}:{os.getpid()}:{unique or secrets.token_hex(4)}"
