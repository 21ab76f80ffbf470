"""One engine of a fleet: the engine, mirror and model of the single process, in an actor of Ray Serve.

The ingress imports this module too, and has no torch: what needs it is imported where an actor is made.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.exceptions import RayServeException

from range_store.storage.replicas import new_replica_name
from workers.cluster.errors import ClusterError
from workers.cluster.messages import (
    EXPECTED_ERRORS,
    CallReply,
    PackedAnswer,
    PackedError,
    RemoteRequest,
    RequestContext,
)
from workers.cluster.metrics import MetricsAddress, MetricsServer, ReplicaMetrics, serve_metrics
from workers.engine.answers import Load
from workers.engine.errors import Draining, EngineFailed
from workers.models.facts import ModelFacts

if TYPE_CHECKING:
    from workers.models.loading import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaSettings:
    """What every replica of a fleet is started with; plain data, since it travels.

    Attributes:
        name: what the model is called in the store.
        model: arguments of `workers.models.loading.load_model`, `source` among them.
        threads: CPU threads of torch.
        redis: arguments of `range_store.embedded.connection.connect`, but for `directory`.
        engine: fields of `workers.engine.settings.EngineSettings`; `max_batch_tokens` may be None: by the device.
        poll_seconds: how often the live state is read again.
        metrics: where each serves its own; None: nowhere.
    """

    name: str
    model: dict[str, Any]
    threads: int | None
    redis: dict[str, Any]
    engine: dict[str, Any]
    poll_seconds: float
    metrics: MetricsAddress | None = None


@dataclass(frozen=True)
class ReplicaInfo:
    """What a replica tells of itself, before it joins too. `failure`: why it cannot serve."""

    settings: ReplicaSettings
    facts: ModelFacts | None
    max_batch_tokens: int
    failure: PackedError | None


class EngineReplica:
    """An actor of Ray Serve, which makes, routes to, watches and replaces it.

    It loads and warms up when it is made. It joins, and from then on answers, when it is told the fleet's fingerprint
    and has it itself (`reconfigure`); Serve sends a new replica nothing before that.
    """

    def __init__(self, settings: ReplicaSettings, name: str | None = None) -> None:
        from prometheus_client import CollectorRegistry

        from range_store.embedded.connection import connect
        from range_store.storage.mirror import Mirror
        from range_store.storage.store import RangeStore
        from workers.engine.engine import Engine
        from workers.engine.settings import EngineSettings, batch_tokens_for

        self._settings = settings
        self._name = name or replica_name()
        self._joined = False
        self._failure: PackedError | None = None
        self._engine: Engine | None = None
        self._mirror: Mirror | None = None
        self._facts: ModelFacts | None = None
        self._registry = CollectorRegistry()
        self._exposed: MetricsServer | None = None
        self._max_batch_tokens = 0
        self._measured = (time.monotonic(), 0.0)
        try:
            with ThreadPoolExecutor(1, "loader") as loader:  # a thread that ends, and its OpenMP team with it
                model = loader.submit(_load, settings).result()
            client = connect(**settings.redis, directory=Path())
            store = RangeStore(client, settings.name)
            self._mirror = Mirror(
                store,
                model.identity.fingerprint,
                poll=settings.poll_seconds,
                replica=self._name,
                earlier_fingerprint=model.earlier_fingerprint,
            )
            engine = dict(settings.engine)
            engine["max_batch_tokens"] = engine["max_batch_tokens"] or batch_tokens_for(model.device.type)
            self._max_batch_tokens = engine["max_batch_tokens"]
            self._engine = Engine(model, self._mirror, EngineSettings(**engine), self._registry)
            self._engine.start()
            self._facts = model.facts
        except EXPECTED_ERRORS as error:  # told by `about`; raised here, it would be words within words
            self._failure = PackedError.of(error)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Join the fleet of the fingerprint, if it is told.

        Raises:
            ClusterError: this is another model, it could not be loaded, or what is active in the store cannot be used.
        """
        fingerprint = config.get("fingerprint")
        if fingerprint is None or self._joined:
            return
        if self._failure is not None:
            raise ClusterError(self._failure.message)
        assert self._facts is not None
        if self._facts.identity.fingerprint != fingerprint:
            raise ClusterError(
                f"{self._facts.source} has fingerprint {self._facts.identity.fingerprint} here, the fleet's is "
                f"{fingerprint}: every node must have the same checkpoint"
            )
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        """Report to the store and read it, now, so that no request ever waits for that."""
        from ray.util import get_node_ip_address

        assert self._mirror is not None
        assert self._mirror.heartbeat is not None
        assert self._facts is not None
        metrics = ReplicaMetrics(self._settings.name, self._registry, self._mirror, self._facts)
        self._exposed = serve_metrics(metrics, self._settings.metrics, get_node_ip_address())
        self._mirror.heartbeat.metrics_address = self._exposed.address if self._exposed is not None else None
        self._mirror.heartbeat.dtype = self._facts.dtype
        self._mirror.start()
        if self._mirror.snapshot is None:
            why = self._mirror.problem or "it gave nothing"
            self._mirror.withdraw()
            self._mirror.close()
            self._end_exposing()
            raise ClusterError(f"the live state of {self._settings.name} cannot be read: {why}")
        self._joined = True

    async def info(self) -> ReplicaInfo:
        """What this replica is."""
        return ReplicaInfo(self._settings, self._facts, self._max_batch_tokens, self._failure)

    async def classify(self, wanted: Sequence[RemoteRequest]) -> CallReply:
        """Each request's answer, or the error that the engine gave it."""
        outcomes = await asyncio.gather(*(self._alone(one) for one in wanted))
        gone = self._ends()
        return CallReply(self._name, tuple(outcomes), self._load, gone)

    async def look(self, what: str, arguments: dict[str, Any], origin: RequestContext) -> Any:
        """What `looking` gives: a list of tokens, an array, or the error as `PackedError`."""
        assert self._engine is not None
        self._serves(origin)
        try:
            if not self._joined:
                raise Draining
            return await getattr(self._engine.inspector, what)(**arguments)
        except EXPECTED_ERRORS as error:
            return PackedError.of(error)

    def check_health(self) -> None:
        """Asked by Serve; raises if the engine died."""
        if self._ends():
            raise ClusterError("the engine died")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve: tokens that wait or run, and the share of the time since the last call that the model ran."""
        now, load = time.monotonic(), self._load
        (before, busy), self._measured = self._measured, (now, load.busy_seconds)
        share = min(1.0, (load.busy_seconds - busy) / max(now - before, 1e-3))
        return {"queued_tokens": float(load.tokens), "busy_share": share}

    def __del__(self) -> None:
        """Called by Serve when nothing is under way here any more."""
        if self._engine is not None:
            self._engine.drain()
        if self._joined and self._mirror is not None:
            self._mirror.withdraw()
        if self._engine is not None:
            self._engine.close()
        if self._joined and self._mirror is not None:
            self._mirror.close()
        self._end_exposing()
        self._joined = False

    def _end_exposing(self) -> None:
        if self._exposed is not None:
            self._exposed.close()
        self._exposed = None

    def _serves(self, origin: RequestContext) -> None:
        """Called at the start of a request's own task."""

    async def _alone(self, wanted: RemoteRequest) -> PackedAnswer | PackedError:
        """Its outcome. A fault of the program, too, is of this request: others that travelled with it go on."""
        try:
            return await self._answered(wanted)
        except Exception as error:
            logger.error("a request failed: %s", type(error).__name__, exc_info=error)
            return PackedError.of(EngineFailed("a fault in a replica; its log says more"))

    async def _answered(self, wanted: RemoteRequest) -> PackedAnswer | PackedError:
        self._serves(wanted.origin)
        engine = self._engine
        try:
            if engine is None or not self._joined:
                raise Draining
            answer = await engine.classify(
                wanted.texts,
                wanted.erase,
                compare=wanted.compare,
                truncate=wanted.truncate,
                timeout=wanted.timeout,
                min_generation=wanted.min_generation,
            )
            return PackedAnswer.of(answer)
        except EXPECTED_ERRORS as error:
            return PackedError.of(error)

    @property
    def _load(self) -> Load:
        return self._engine.load if self._engine is not None else Load(0, None, 0.0)

    def _ends(self) -> bool:
        """Whether the engine died. Then this process ends at once, and Serve starts another replica: one that fails
        quickly would seem the idlest of all, and draw requests to itself."""
        if self._engine is None or self._engine.failure is None:
            return False
        logger.critical("the model cannot answer any more: %s", self._engine.failure)
        asyncio.get_running_loop().call_later(0.2, os._exit, 1)
        return True


def replica_name() -> str:
    """For this process; its last part is its id in Serve, by which an ingress takes its report out when it ended."""
    try:
        return new_replica_name(str(serve.get_replica_context().replica_id.unique_id))
    except RayServeException:  # made beside the fleet, to be looked at
        return new_replica_name()


def _load(settings: ReplicaSettings) -> "LoadedModel":
    from workers.models.loading import load_model, use_threads

    use_threads(settings.threads)
    return load_model(**settings.model)
