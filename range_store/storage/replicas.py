"""Which replicas of a model are live, and at which generation each one answers.

A replica reports its status before its first read of the live state, at every new generation, and every second. A
status expires after ten seconds by Redis's clock. So whoever changes the live state and then reads the roster knows
which replicas do not follow yet: one that is not listed reads the live state before it answers anything.
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
from range_store.storage.schema import REPORT, ModelKeys

HEARTBEAT_SECONDS = 1.0
"""Time between two reports of a replica whose generation does not change."""
SILENT_SECONDS = 3.5
"""A replica that could not report for this long reads the live state before it admits a request. A new roster may be
incomplete for this long. It is more than a heartbeat plus the timeout of a Redis that hangs."""
LEASE_SECONDS = 10.0
"""Time until a status expires that is not renewed, e.g. of a replica that was killed."""
MAX_NAMED = 5
"""Replicas that a message names at most."""
SINCE = b"since"
"""Field of the hash that is not a replica: Unix time of the first status, by Redis's clock."""

Name = Annotated[str, Field(pattern=r"^\S{1,300}$")]
ADDRESS = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")


class ReplicaStatus(BaseModel):
    """What one replica reported; newer versions may add fields. Times are Unix seconds by Redis's clock.

    `name`: `host:process:random`, unique. `generation`: None before the first read. `expires`: when it no longer counts
    as live. `metrics`: `host:port` of its own metrics, if any. `dtype`: of the model's parameters.
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
        """Drop an invalid address but keep the replica, since others wait for it."""
        return value if isinstance(value, str) and ADDRESS.fullmatch(value) else None

    @property
    def host(self) -> str:
        """The machine or container that it runs on."""
        return self.name.split(":")[0]


@dataclass(frozen=True)
class Roster:
    """The live replicas by name, at Unix time `now` of Redis; `since`: when the first of them reported.

    `since` is None if none ever reported, or Redis was emptied.
    """

    now: float
    since: float | None
    replicas: tuple[ReplicaStatus, ...]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that the model is served in, as far as they were reported."""
        return tuple(sorted({each.dtype for each in self.replicas if each.dtype is not None}))

    def missing(self, generation: str) -> tuple[str, ...]:
        """Return the names of replicas that are not at `generation` or a later one of its epoch."""
        return tuple(
            each.name
            for each in self.replicas
            if each.generation is None or not is_at_least(each.generation, generation)
        )


class ReplicaRegistry:
    """The statuses of one model's replicas. Each method costs one round trip; safe to use from any thread.

    Every method raises StoreUnavailable if Redis cannot be reached or refuses.
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
        """Store the status of a replica for `seconds`, and return how many replicas are live."""
        status: list[str | float] = [name, generation or "", range_set or "", seconds, metrics or "", dtype or ""]
        with translate_redis_errors():
            return cast(int, self._report([self._key], status))

    def remove(self, name: str) -> None:
        """Remove the status of a replica that takes no more requests."""
        with translate_redis_errors():
            self._client.hdel(self._key, name)

    def forget(self, suffix: str) -> bool:
        """Remove replicas of an ended process, by the last part of their names; return whether none is left.

        A replica is removed only after it missed a heartbeat: one that is still alive keeps reporting.
        """
        roster = self.read()
        held = [each for each in roster.replicas if each.name.endswith(f":{suffix}")]
        silent = [each.name for each in held if roster.now - each.at > 1.5 * HEARTBEAT_SECONDS]
        for name in silent:
            self.remove(name)
        return len(silent) == len(held)

    def read(self) -> Roster:
        """Return the live replicas. Invalid statuses are ignored."""
        with translate_redis_errors(), self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.hgetall(self._key)
            (seconds, microseconds), stored = pipeline.execute()
        now = seconds + microseconds / 1e6
        found = []
        for name, status in stored.items():
            try:
                replica = ReplicaStatus.model_validate({**json.loads(status), "name": name.decode()})
            except (ValueError, TypeError, RecursionError):
                continue
            if replica.expires > now:
                found.append(replica)
        since = float(stored[SINCE]) if re.fullmatch(rb"[0-9]+(\.[0-9]+)?", stored.get(SINCE, b"")) else None
        return Roster(now, since, tuple(sorted(found, key=lambda each: each.name)))


class ReplicaWait:
    """Decides from successive rosters whether every replica is at a generation.

    Args:
        own: returns the name of a replica that must be among them even if its report failed, or None.
    """

    def __init__(self, generation: str, own: Callable[[], str | None] = lambda: None) -> None:
        self.generation = generation
        self.missing: tuple[str, ...] = ()
        """The replicas that were not at the generation in the last roster."""
        self.replicas = 0
        """The number of replicas in the last roster."""
        self._own = own
        self._empty_since: float | None = None

    def done(self, roster: Roster) -> bool:
        """Whether all replicas are at the generation. With no replicas, that is once it is certain that none lives."""
        if roster.since is not None:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = roster.now
        since = roster.since if self._empty_since is None else self._empty_since
        # after Redis was emptied, the roster is incomplete until each replica has reported again
        complete = since is not None and roster.now - since >= SILENT_SECONDS
        own, names = self._own(), {each.name for each in roster.replicas}
        silent = () if own is None or own in names else (own,)
        self.missing = (*roster.missing(self.generation), *silent)
        self.replicas = len(names) + len(silent)
        return complete and not self.missing

    def why(self) -> str:
        """Describe what was missing in the last roster."""
        if self.missing:
            named = ", ".join(self.missing[:MAX_NAMED]) + (", …" if len(self.missing) > MAX_NAMED else "")
            return f"{len(self.missing)} of {self.replicas} replicas do not report it yet ({named})"
        return "the replicas began to report only now (was Redis emptied?), so some may not be listed yet"


def new_replica_name(unique: str | None = None) -> str:
    """Return a name for a replica in this process; `unique` is its last part (default: random)."""
    host = re.sub(r"[\s:]", "-", socket.gethostname()) or "localhost"
    return f"{host}:{os.getpid()}:{unique or secrets.token_hex(4)}"
