"""One replica of a fleet: the engine, mirror and model of the single process, in an actor of Ray Serve.

The ingress imports this module too, without torch: what needs torch is imported when a replica loads.
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

from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util import get_node_ip_address

from range_store.embedded.connection import connect
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import new_replica_name
from range_store.storage.store import RangeStore
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
from workers.engine.settings import EngineSettings, batch_tokens_for
from workers.models.facts import ModelFacts

if TYPE_CHECKING:
    from workers.engine.engine import Engine
    from workers.models.loading import LoadedModel

logger = logging.getLogger(__name__)

EXIT_SECONDS = 0.2
"""Time between the failure of the engine and the end of the process, in which its last replies are sent."""


@dataclass(frozen=True)
class ReplicaSettings:
    """The settings of every replica of a fleet, as plain data.

    Attributes:
        name: the model's name in the store.
        model: arguments of `workers.models.loading.load_model`, including `source`.
        threads: CPU threads of torch.
        redis: arguments of `range_store.embedded.connection.connect`, except `directory`.
        engine: fields of `EngineSettings`; `max_batch_tokens` None: by the device.
        poll_seconds: time between two reads of the live state.
        metrics: where each replica serves its metrics; None: nowhere.
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
    """What a replica loaded. `failure`: why it cannot serve; then there are no `facts`."""

    settings: ReplicaSettings
    facts: ModelFacts | None
    max_batch_tokens: int
    failure: PackedError | None


@dataclass(frozen=True, eq=False)
class Loaded:
    engine: "Engine"
    mirror: Mirror
    facts: ModelFacts


class EngineReplica:
    """An actor that Ray Serve creates, routes calls to, checks and replaces.

    It loads its model when it is created, and joins the fleet when its configuration has the fleet's fingerprint
    (`reconfigure`). Serve sends a new replica no requests before that.
    """

    def __init__(self, settings: ReplicaSettings, name: str | None = None) -> None:
        self._settings = settings
        self._name = name or replica_name()
        self._registry = CollectorRegistry()
        self._loaded: Loaded | None = None
        self._failure: PackedError | None = None
        self._joined = False
        self._metrics_server: MetricsServer | None = None
        self._measured = (time.monotonic(), 0.0)
        try:
            self._loaded = _load(settings, self._name, self._registry)
        except EXPECTED_ERRORS as error:  # reported by `info`: Serve would turn it into text, with a traceback
            self._failure = PackedError.of(error)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Join the fleet if the configuration has a fingerprint.

        Raises:
            ClusterError: the model has another fingerprint or was not loaded, or the live state cannot be used.
        """
        fingerprint = config.get("fingerprint")
        if fingerprint is None or self._joined:
            return
        if self._loaded is None:
            raise ClusterError(self._failure.message if self._failure is not None else "the model was not loaded")
        facts = self._loaded.facts
        if facts.identity.fingerprint != fingerprint:
            raise ClusterError(
                f"{facts.source} has fingerprint {facts.identity.fingerprint} on this node, but the fleet's is "
                f"{fingerprint}: every node must have the same checkpoint"
            )
        await asyncio.to_thread(self._join, self._loaded)

    def _join(self, loaded: Loaded) -> None:
        """Report to the store and read the live state, so that no request ever waits for that."""
        mirror, facts = loaded.mirror, loaded.facts
        metrics = ReplicaMetrics(self._settings.name, self._registry, mirror, facts)
        self._metrics_server = serve_metrics(metrics, self._settings.metrics, get_node_ip_address())
        assert mirror.heartbeat is not None
        mirror.heartbeat.metrics_address = self._metrics_server.address if self._metrics_server else None
        mirror.heartbeat.dtype = facts.dtype
        mirror.start()
        if mirror.snapshot is None:
            self._leave(mirror)
            mirror.close()
            raise ClusterError(
                f"cannot read the live state of {self._settings.name}: {mirror.problem or 'it is empty'}"
            )
        self._joined = True

    def _leave(self, mirror: Mirror) -> None:
        """Remove this replica from the store's roster, and its metrics from the network."""
        mirror.withdraw()
        if self._metrics_server is not None:
            self._metrics_server.close()
        self._metrics_server = None

    async def info(self) -> ReplicaInfo:
        """What this replica loaded."""
        if self._loaded is None:
            return ReplicaInfo(self._settings, None, 0, self._failure)
        tokens = self._loaded.engine.settings.max_batch_tokens
        return ReplicaInfo(self._settings, self._loaded.facts, tokens, None)

    async def classify(self, requests: Sequence[RemoteRequest]) -> CallReply:
        """Answer each request, or give the error that it met."""
        outcomes = await asyncio.gather(*(self._answer(request) for request in requests))
        ending = self._end_if_failed()
        return CallReply(self._name, tuple(outcomes), self._load, ending)

    async def inspect(self, method: str, arguments: dict[str, Any], context: RequestContext) -> Any:
        """The result of a method of the engine's `inspector`, or its error as a `PackedError`."""
        self._begin_request(context)
        try:
            return await getattr(self._serving_engine.inspector, method)(**arguments)
        except EXPECTED_ERRORS as error:
            return PackedError.of(error)

    def check_health(self) -> None:
        """Called by Serve. Raises ClusterError if the engine has failed."""
        if self._end_if_failed():
            raise ClusterError("the engine has failed")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: tokens that wait or run, and the share of time that the model ran since the last call."""
        now, load = time.monotonic(), self._load
        (before, busy), self._measured = self._measured, (now, load.busy_seconds)
        share = min(1.0, (load.busy_seconds - busy) / max(now - before, 1e-3))
        return {"queued_tokens": float(load.tokens), "busy_share": share}

    def __del__(self) -> None:
        """Called by Serve when no request is being processed here any more."""
        if self._loaded is None:
            return
        self._loaded.engine.drain()
        if self._joined:
            self._leave(self._loaded.mirror)
        self._loaded.engine.close()
        if self._joined:
            self._loaded.mirror.close()
        self._joined = False

    def _begin_request(self, context: RequestContext) -> None:
        """Called first in the task of each request."""

    async def _answer(self, request: RemoteRequest) -> PackedAnswer | PackedError:
        """Answer one request. A fault of the program fails this request, and no other of the same call."""
        self._begin_request(request.context)
        try:
            answer = await self._serving_engine.classify(
                request.texts,
                request.erase,
                compare=request.compare,
                truncate=request.truncate,
                timeout=request.timeout,
                min_generation=request.min_generation,
            )
            return PackedAnswer.of(answer)
        except EXPECTED_ERRORS as error:
            return PackedError.of(error)
        except Exception as error:
            logger.error("a request failed: %s", type(error).__name__, exc_info=error)
            return PackedError.of(EngineFailed("an internal error in a replica; see the replica's log"))

    @property
    def _serving_engine(self) -> "Engine":
        """Raises Draining if this replica has not joined, or has left."""
        if self._loaded is None or not self._joined:
            raise Draining
        return self._loaded.engine

    @property
    def _load(self) -> Load:
        return self._loaded.engine.load if self._loaded is not None else Load(0, None, 0.0)

    def _end_if_failed(self) -> bool:
        """Whether the engine has failed. Then this process ends at once, and Serve starts another replica.

        A replica that fails quickly would have the fewest calls, and Serve would route most of them to it.
        """
        if self._loaded is None or self._loaded.engine.failure is None:
            return False
        logger.critical("the engine has failed, this replica ends: %s", self._loaded.engine.failure)
        asyncio.get_running_loop().call_later(EXIT_SECONDS, os._exit, 1)
        return True


def replica_name() -> str:
    """A name for this process. Its last part is the id in Serve, by which an ingress forgets replicas that ended."""
    try:
        return new_replica_name(str(serve.get_replica_context().replica_id.unique_id))
    except RayServeException:  # not created by Serve: only its checkpoint is tried
        return new_replica_name()


def _load(settings: ReplicaSettings, name: str, registry: CollectorRegistry) -> Loaded:
    """Raises EXPECTED_ERRORS."""
    from workers.engine.engine import Engine

    with ThreadPoolExecutor(1, "loader") as loader:  # a thread that ends, and its OpenMP threads with it
        model = loader.submit(_load_model, settings).result()
    store = RangeStore(connect(**settings.redis, directory=Path()), settings.name)
    fingerprint, earlier = model.identity.fingerprint, model.earlier_fingerprint
    mirror = Mirror(store, fingerprint, poll=settings.poll_seconds, replica=name, earlier_fingerprint=earlier)
    batch_tokens = settings.engine["max_batch_tokens"] or batch_tokens_for(model.device.type)
    engine = Engine(model, mirror, EngineSettings(**{**settings.engine, "max_batch_tokens": batch_tokens}), registry)
    engine.start()
    return Loaded(engine, mirror, model.facts)


def _load_model(settings: ReplicaSettings) -> "LoadedModel":
    from workers.models.loading import load_model, use_threads

    use_threads(settings.threads)
    return load_model(**settings.model)
