"""A replica that logs like a server: with the id and the trace of the request that the ingress received."""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass

from app.observability.logs import RequestFacts, begin, configured, note
from app.observability.tracing import follow
from workers.cluster.messages import PackedAnswer, PackedError, RemoteRequest, RequestContext
from workers.cluster.replica import EngineReplica, Loaded, ReplicaSettings, replica_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Logs:
    """The ingress's settings, not those of this node's environment; see `app.observability.logs.LogSettings`."""

    log_level: str
    log_format: str


class LoggedReplica(EngineReplica):
    """Logs to stderr, which Ray writes to a file on the node (docs/observing.md)."""

    def __init__(self, settings: ReplicaSettings, logs: Logs) -> None:
        name = replica_name()
        self._logging = ExitStack()
        self._logging.enter_context(configured(logs, model=settings.name, replica=name))
        super().__init__(settings, name)

    def _join(self, loaded: Loaded) -> None:
        super()._join(loaded)
        logger.info("replica ready")

    def _begin_request(self, context: RequestContext) -> None:
        begin(RequestFacts(context.request_id))
        follow(context.traceparent)

    async def _answer(self, request: RemoteRequest) -> PackedAnswer | PackedError:
        began = time.perf_counter()
        outcome = await super()._answer(request)
        note(generation=outcome.generation if isinstance(outcome, PackedAnswer) else None)
        message = "answered" if isinstance(outcome, PackedAnswer) else f"not answered: {outcome.kind.__name__}"
        logger.debug(message, extra={"texts": len(request.texts), "seconds": round(time.perf_counter() - began, 6)})
        return outcome

    def __del__(self) -> None:
        super().__del__()
        logger.info("replica drained, shutting down")
        self._logging.close()
