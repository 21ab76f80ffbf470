"""Answers texts with a fleet of replicas. Does not load torch.

Ray Serve routes calls and replaces replicas, but repeats no call whose replica was lost, and bounds calls by their
number only. So here each such request is sent once more, and what an ingress holds is bounded by texts and characters.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from range_store.domain.erasure import Erasure, Site
from range_store.errors import GenerationNotReached
from workers.cluster.calls import CALL_CHARACTERS, PendingRequest, ReplicaCalls, ReturnedUnread
from workers.cluster.messages import PackedError, RemoteRequest, RequestContext
from workers.cluster.metrics import FleetMetrics
from workers.engine.answers import Answer
from workers.engine.errors import DeadlineExceeded, Draining, EngineError, QueueFull, ReplicaLost
from workers.engine.settings import EngineSettings
from workers.models.texts import TextOrPair, TokenizedText, characters

ATTEMPTS = 2
"""How often a request is sent if its replicas are lost."""
RETURNED_SECONDS = 2.0
"""How long a request is sent again after stopping replicas return it unread. Serve soon stops choosing them."""
HELD_QUEUES = 2
"""An ingress holds the texts and characters of this many full queues of its fleet: one there, and one on the way."""
CHARACTERS_PER_TOKEN = 4
"""Characters that are taken for one token of a queue."""


class Fleet:
    """Answers texts with the replicas behind a handle; see `workers.engine.answers.Answerer`.

    Args:
        handle: handle of the Serve application.
        settings: of each replica's engine.
        replicas, target_replicas: return how many replicas take requests, and how many Serve aims at.
        generation: returns the generation that this ingress knows. No request is answered under an earlier one.
        context: returns how the current request is identified here.
    """

    def __init__(
        self,
        handle: Any,
        settings: EngineSettings,
        replicas: Callable[[], int],
        target_replicas: Callable[[], int],
        generation: Callable[[], str | None],
        registry: CollectorRegistry,
        context: Callable[[], RequestContext] = RequestContext,
    ) -> None:
        self.settings = settings
        self.inspector = RemoteInspector(self)
        self.metrics = FleetMetrics(registry, replicas, target_replicas)
        self.calls = ReplicaCalls(handle, self.metrics.calls)
        self.context = context
        self._replicas, self._generation = replicas, generation
        self._lost = self._draining = False
        self._texts = self._characters = 0

    @property
    def failure(self) -> str | None:
        return self.calls.failure

    @property
    def ready(self) -> bool:
        """Whether a replica takes requests, and this process too."""
        return not self._draining and not self._lost and self._replicas() > 0

    def mark_lost(self) -> None:
        """Report not ready, since the cluster is lost. Requests are still answered while replicas do."""
        self._lost = True

    def fail_pending(self, reason: str) -> None:
        """Fail all requests, those that wait included. May be called from any thread."""
        self._lost = True
        self.calls.fail_all(reason)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Take no new requests; those accepted are still answered."""
        self._draining = True

    def refusal(self, *, counted: bool = True) -> QueueFull | None:
        """Why a request of one text would be refused now, as far as this process knows; `counted` as a rejection.

        Known before a body is read: each reply reports how full its replica is.
        """
        if self._draining:
            return None
        full = self._full(1, 0)
        if full is None and len(loads := self.calls.loads) >= self._replicas():
            waits = [load.retry_after for load in loads if load.retry_after is not None]
            if waits and len(waits) == len(loads):
                full = QueueFull(min(waits))
        if full is not None and counted:
            self.metrics.rejections.labels("queue_full").inc()
        return full

    async def classify(
        self,
        texts: Sequence[TextOrPair],
        erase: Sequence[Erasure] | None,
        *,
        compare: bool = False,
        truncate: bool = True,
        timeout: float | None = None,
        min_generation: str | None = None,
    ) -> Answer:
        """As `workers.engine.engine.Engine.classify`, on some replica.

        Raises:
            ReplicaLost: two replicas were lost with the request, or there is none.
        """
        request = RemoteRequest(texts, erase, compare, truncate, timeout, min_generation, self.context())
        length = sum(map(characters, texts))
        try:
            self._check(len(texts), length)
            self._texts += len(texts)
            self._characters += length
            try:
                async with asyncio.timeout(timeout):
                    return await self._answer(request, len(texts), length)
            finally:
                self._texts -= len(texts)
                self._characters -= length
        except (TimeoutError, DeadlineExceeded):
            self.metrics.rejections.labels("deadline").inc()
            raise DeadlineExceeded(timeout or 0.0) from None
        except asyncio.CancelledError:
            self.metrics.rejections.labels("cancelled").inc()
            raise
        except EngineError as error:
            self.metrics.count(error)
            raise

    async def _answer(self, request: RemoteRequest, texts: int, length: int) -> Answer:
        waits = request.min_generation is not None
        if not waits:  # so that a change made at this ingress applies to the next request here
            request = replace(request, min_generation=self._generation())
        retries, behind_replicas = Retries(self.metrics), 0
        while True:
            try:
                return await self.calls.send(PendingRequest(request, texts, length, waits))
            except ReplicaLost as lost:
                await retries.wait(lost)
            except GenerationNotReached as behind:
                behind_replicas += 1
                if waits or behind_replicas == ATTEMPTS:
                    raise
                if behind.held is not None and _epoch(behind.held) != _epoch(behind.wanted):
                    request = replace(request, min_generation=None)  # a new epoch: the replica may be ahead of us

    def _check(self, texts: int, length: int) -> None:
        if self._draining:
            raise Draining
        if self._lost and length > CALL_CHARACTERS:  # it would need the lost node; Ray would end this process
            raise ReplicaLost("the cluster is lost; its replicas take only smaller requests: try another server")
        if (full := self._full(texts, length)) is not None:
            raise full

    def _full(self, texts: int, length: int) -> QueueFull | None:
        """Why this process can hold no such request. If it holds none, it takes one of any size."""
        queues = HELD_QUEUES * max(1, self._replicas())
        too_many = self._texts + texts > queues * self.settings.max_queue_texts
        too_long = self._characters + length > queues * self.settings.max_queue_tokens * CHARACTERS_PER_TOKEN
        if not self._texts or not (too_many or too_long):
            return None
        waits = [load.retry_after for load in self.calls.loads if load.retry_after is not None]
        return QueueFull(min(waits, default=1.0))


class RemoteInspector:
    """Tokens and states of texts, by some replica; see `workers.engine.answers.TextInspector`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def tokens(self, texts: Sequence[str], *, timeout: float | None = None) -> list[TokenizedText]:
        """As `workers.engine.inspector.Inspector.tokens`."""
        found: list[TokenizedText] = await self._call("tokens", timeout, texts=list(texts))
        return found

    async def states(
        self,
        texts: Sequence[str],
        layer: int,
        *,
        site: Site = "block_output",
        position: Literal["read", "mean"] = "read",
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """As `workers.engine.inspector.Inspector.states`."""
        found: npt.NDArray[np.float32] = await self._call(
            "states", timeout, texts=list(texts), layer=layer, site=site, position=position
        )
        return found

    async def _call(self, method: str, timeout: float | None, **arguments: Any) -> Any:
        if self._fleet.draining:
            raise Draining
        retries = Retries(self._fleet.metrics)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return await self._call_once(method, {**arguments, "timeout": timeout})
                    except ReplicaLost as lost:
                        await retries.wait(lost)
        except (TimeoutError, DeadlineExceeded):
            raise DeadlineExceeded(timeout or 0.0) from None

    async def _call_once(self, method: str, arguments: dict[str, Any]) -> Any:
        found = await self._fleet.calls.call("inspect", method, arguments, self._fleet.context())
        if not isinstance(found, PackedError):
            return found
        error = found.unpack()
        raise ReturnedUnread(str(error)) if isinstance(error, Draining) else error


class Retries:
    """Decides whether one request is sent again."""

    def __init__(self, metrics: FleetMetrics) -> None:
        self._metrics = metrics
        self._lost = self._returned = 0
        self._until = math.inf

    async def wait(self, lost: ReplicaLost) -> None:
        """Return when the request may be sent again. Raises `lost` if it may not."""
        if isinstance(lost, ReturnedUnread):
            now = time.monotonic()
            if not self._returned:  # however long it was under way until then
                self._until = now + RETURNED_SECONDS
            self._returned += 1
            last = now > self._until
        else:
            self._lost += 1
            last = self._lost == ATTEMPTS
        (self._metrics.lost if last else self._metrics.retried).inc()
        if last:
            raise lost
        if isinstance(lost, ReturnedUnread):
            await asyncio.sleep(min(0.2, 0.01 * 2**self._returned))


def _epoch(generation: str) -> str:
    return generation.split("-")[0]
