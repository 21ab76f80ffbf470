"""Answers with a fleet: what arrives together travels in one call, and comes back one by one. Without torch.

Which replica gets a call is Serve's choice, by how many calls each has. Ours is that each request gets its own answer
or its own error, that one whose replica was lost is tried once more elsewhere, and that what is held is bounded.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from range_store.domain.erasure import Erasure, Site
from range_store.errors import GenerationNotReached
from workers.cluster.errors import first_line
from workers.cluster.messages import CallReply, PackedAnswer, PackedError, RemoteRequest, RequestContext
from workers.cluster.metrics import FleetMetrics
from workers.engine.answers import Answer, Load
from workers.engine.errors import DeadlineExceeded, Draining, EngineError, EngineFailed, QueueFull, ReplicaLost
from workers.engine.settings import EngineSettings
from workers.models.texts import TextOrPair, TokenizedText, characters

PAUSE_SECONDS = 0.003
"""Least time between two sendings while calls are under way: a call costs both sides about a millisecond of CPU."""
CALL_TEXTS = 64
"""Texts of one call at most, unless one request alone has more: a call is over when its slowest request is."""
CALL_CHARACTERS = 16_384
"""Characters of one call, in the same way."""
ATTEMPTS = 2
"""So often a request is sent if the replicas that have it are lost."""
LEAVING_SECONDS = 2.0
"""How long a request is sent anew from the first time on that a replica which leaves sent it back unread; Serve soon
knows that they do."""
FRESH_SECONDS = 1.0
"""How long what a replica said of its load counts."""
HELD = 2
"""An ingress holds requests of so many times the characters and texts that its fleet's queues do: all of a queue, and
as much on its way."""
CHARACTERS_PER_TOKEN = 4


class _SentBack(ReplicaLost):
    """A replica that is leaving did not take the request."""


@dataclass(eq=False)
class _Held:
    """A request that is to be sent, or was.

    `waits`: it asks for a generation by itself. `done`: its answer, an error of ours, or `ReplicaLost`.
    """

    wanted: RemoteRequest
    ends: float
    texts: int
    characters: int
    waits: bool
    done: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Fleet:
    """Answers texts with the replicas behind a handle; see `workers.engine.answers.Answerer`.

    Args:
        handle: of the deployment.
        settings: of each replica's engine.
        replicas: tells how many take requests now.
        wanted: tells how many there are to be.
        generation: which one of the live state this ingress knows; no request is answered under an earlier one.
        origin: what the request that is being served is called here.
    """

    def __init__(
        self,
        handle: Any,
        settings: EngineSettings,
        replicas: Callable[[], int],
        wanted: Callable[[], int],
        generation: Callable[[], str | None],
        registry: CollectorRegistry,
        origin: Callable[[], RequestContext] = RequestContext,
    ) -> None:
        self.settings = settings
        self.origin = origin
        self.inspector = RemoteInspector(self)
        self.failure: str | None = None
        self.metrics = FleetMetrics(registry, replicas, wanted)
        self._handle = handle
        self._replicas = replicas
        self._generation = generation
        self._lost = False
        self._given_up: asyncio.Future[None] | None = None
        self._draining = False
        self._waiting: list[_Held] = []
        self._sending: asyncio.Handle | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._next_at = 0.0
        self._texts = self._characters = 0
        self._loads: dict[str, tuple[float, Load]] = {}

    @property
    def ready(self) -> bool:
        """A replica takes requests, and so does this process."""
        return not self._draining and not self._lost and self._replicas() > 0

    def mark_lost(self) -> None:
        """The cluster is lost: not ready any more. What replicas still answer is answered. From any thread."""
        self._lost = True

    def fail_pending(self, why: str) -> None:
        """Nothing is answered any more, nor what waits for an answer now. From any thread."""
        self._lost, self.failure = True, why
        if (waited_for := self._given_up) is not None:
            with suppress(RuntimeError):  # its loop is closed
                waited_for.get_loop().call_soon_threadsafe(self._end)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """Take no new requests; those accepted are still answered."""
        self._draining = True

    def refusal(self, *, counted: bool = True) -> QueueFull | None:
        """Why not even one text would be taken now, as far as is known; a request that is refused so is `counted`.

        Each reply tells how full its replica is. When all of the fleet have just said that they take nothing, or this
        process holds all that it may, that is known before a body is read.
        """
        if self._draining:
            return None
        full = self._full(1, 0)
        if full is None and (fresh := self._fresh()) and len(fresh) >= self._replicas():
            waits = [load.retry_after for load in fresh]
            if None not in waits:
                full = QueueFull(min(wait for wait in waits if wait is not None))
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
            ReplicaLost: the replica that had the request was lost, and so was the next one; or there is none.
        """
        wanted = RemoteRequest(texts, erase, compare, truncate, timeout, min_generation, self.origin())
        length = sum(map(characters, texts))
        try:
            self._check(len(texts), length)
            self._texts += len(texts)
            self._characters += length
            try:
                async with asyncio.timeout(timeout):
                    return await self._answer(wanted, len(texts), length)
            finally:
                self._texts -= len(texts)
                self._characters -= length
        except TimeoutError:
            self.metrics.rejections.labels("deadline").inc()
            raise DeadlineExceeded(timeout or 0.0) from None
        except asyncio.CancelledError:
            self.metrics.rejections.labels("cancelled").inc()
            raise
        except DeadlineExceeded:  # a replica counts what was left of the time
            self.metrics.rejections.labels("deadline").inc()
            raise DeadlineExceeded(timeout or 0.0) from None
        except EngineError as error:
            self.metrics.count(error)
            raise

    async def call(self, method: str, *arguments: Any) -> Any:
        """One call of a replica's method by itself, twice if the replica is lost.

        Raises:
            QueueFull, ReplicaLost, EngineFailed: see `workers.engine.errors`.
        """
        trials = _Trials(self.metrics)
        while True:
            try:
                found = await self._remote(method, *arguments)
                if isinstance(found, PackedError) and isinstance(error := found.error(), Draining):
                    raise _SentBack(str(error))
                return found
            except ReplicaLost as lost:
                await trials.again(lost)

    async def _answer(self, wanted: RemoteRequest, texts: int, length: int) -> Answer:
        ends = math.inf if wanted.timeout is None else time.monotonic() + wanted.timeout
        waits = wanted.min_generation is not None
        if not waits:  # who changes something here, and then asks here, is answered under the change
            wanted = replace(wanted, min_generation=self._generation())
        trials, behinds = _Trials(self.metrics), 0
        while True:
            held = _Held(wanted, ends, texts, length, waits)
            self._waiting.append(held)
            self._plan_sending()
            try:
                return await held.done
            except ReplicaLost as lost:
                await trials.again(lost)
            except GenerationNotReached as behind:
                behinds += 1
                if waits or behinds == ATTEMPTS:
                    raise
                if behind.held is not None and _epoch(behind.held) != _epoch(behind.wanted):
                    wanted = replace(wanted, min_generation=None)  # begun anew: the replica may know more than we do

    def _end(self) -> asyncio.Future[None]:
        """Done when all is given up; of the loop that runs."""
        loop = asyncio.get_running_loop()
        if self._given_up is None or self._given_up.get_loop() is not loop:
            self._given_up = loop.create_future()
        if self.failure is not None and not self._given_up.done():
            self._given_up.set_result(None)
        return self._given_up

    def _check(self, texts: int, length: int) -> None:
        if self._draining:
            raise Draining
        if self._lost and length > CALL_CHARACTERS:  # it would go by the node, and Ray would end this process there
            raise ReplicaLost("the cluster is lost; what is left of it takes no request of this size")
        if (full := self._full(texts, length)) is not None:
            raise full

    def _full(self, texts: int, length: int) -> QueueFull | None:
        """Why no more may be held here. Who sends the first request is not refused, however large it is."""
        room = HELD * max(1, self._replicas())
        too_many = self._texts + texts > room * self.settings.max_queue_texts
        too_long = self._characters + length > room * self.settings.max_queue_tokens * CHARACTERS_PER_TOKEN
        if not self._texts or not (too_many or too_long):
            return None
        waits = [load.retry_after for load in self._fresh() if load.retry_after is not None]
        return QueueFull(min(waits, default=1.0))

    def _fresh(self) -> list[Load]:
        now = time.monotonic()
        self._loads = {name: (at, load) for name, (at, load) in self._loads.items() if now - at < FRESH_SECONDS}
        return [load for _, load in self._loads.values()]

    def _plan_sending(self) -> None:
        """At the end of this turn of the event loop if nothing is under way, else a little later: more may come."""
        if self._sending is not None:
            return
        loop = asyncio.get_running_loop()
        wait = self._next_at - time.monotonic() if self._calls else 0.0
        self._sending = loop.call_later(wait, self._send) if wait > 0 else loop.call_soon(self._send)

    def _send(self) -> None:
        """Send all that waits, in as many calls as its size asks for."""
        self._sending = None
        self._next_at = time.monotonic() + PAUSE_SECONDS
        waiting = [held for held in self._waiting if not held.done.done()]
        self._waiting.clear()
        for some in _calls_of(waiting):
            call = asyncio.get_running_loop().create_task(self._call(some))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _call(self, held: list[_Held]) -> None:
        """One call: everyone in it gets an answer, an error or `ReplicaLost`."""
        left = _Countdown(held)
        now = time.monotonic()
        wanted = [_with_time(each, now) for each in held]
        self.metrics.calls.observe(len(held))
        try:
            reply: CallReply = await self._remote("classify", wanted, unless=left.nobody)
        except Exception as error:
            for each in held:
                each.fail(error)
            return
        self._loads[reply.replica] = (time.monotonic(), reply.load)
        if reply.gone:
            self._loads.pop(reply.replica, None)
        for each, outcome in zip(held, reply.outcomes, strict=True):
            if each.done.done():
                continue
            if isinstance(outcome, PackedAnswer):
                each.done.set_result(outcome.answer(reply.replica))
                continue
            refusal = outcome.error()
            if isinstance(refusal, Draining):
                each.fail(_SentBack(str(refusal)))
            else:
                each.fail(ReplicaLost(str(refusal)) if reply.gone and isinstance(refusal, EngineFailed) else refusal)

    async def _remote(self, method: str, *arguments: Any, unless: asyncio.Event | None = None) -> Any:
        """What a replica's method gives. If nobody waits for it any more, it is cancelled there.

        Raises:
            ReplicaLost: the replica was lost, or there is none.
            QueueFull: the calls that wait for a replica are too many.
            EngineFailed: a fault of the program.
        """
        response = getattr(self._handle, method).remote(*arguments)
        answering = asyncio.ensure_future(_result(response))
        waits: list[asyncio.Future[Any]] = [answering, self._end()]
        nobody = None if unless is None else asyncio.ensure_future(unless.wait())
        if nobody is not None:
            waits.append(nobody)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ReplicaLost(self.failure or "nobody waits for it")
            return await answering
        except BackPressureError:
            raise QueueFull(1.0) from None
        except TaskCancelledError:
            raise ReplicaLost("the replica gave the request up") from None
        except RayError as error:
            if _is_fault(error):
                raise EngineFailed(f"a fault in a replica: {first_line(error)}") from None
            raise ReplicaLost(first_line(error)) from None
        except RayServeException as error:
            raise ReplicaLost(first_line(error)) from None
        finally:
            if nobody is not None:
                nobody.cancel()
            if not answering.done():
                with suppress(Exception):
                    response.cancel()
                answering.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it
                answering.cancel()


class RemoteInspector:
    """Looks at what some replica makes of texts; see `workers.engine.answers.TextInspector`."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def tokens(self, texts: Sequence[str], *, timeout: float | None = None) -> list[TokenizedText]:
        """As `workers.engine.inspector.Looking.tokens`."""
        found: list[TokenizedText] = await self._look("tokens", timeout, texts=list(texts))
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
        """As `workers.engine.inspector.Looking.states`."""
        found: npt.NDArray[np.float32] = await self._look(
            "states", timeout, texts=list(texts), layer=layer, site=site, position=position
        )
        return found

    async def _look(self, what: str, timeout: float | None, **arguments: Any) -> Any:
        if self._fleet.draining:
            raise Draining
        try:
            async with asyncio.timeout(timeout):
                found = await self._fleet.call("look", what, {**arguments, "timeout": timeout}, self._fleet.origin())
        except TimeoutError:
            raise DeadlineExceeded(timeout or 0.0) from None
        if not isinstance(found, PackedError):
            return found
        error = found.error()
        raise DeadlineExceeded(timeout or 0.0) if isinstance(error, DeadlineExceeded) else error


class _Trials:
    """How often one request was sent in vain."""

    def __init__(self, metrics: FleetMetrics) -> None:
        self._metrics = metrics
        self._lost = self._sent_back = 0
        self._until = math.inf

    async def again(self, lost: ReplicaLost) -> None:
        """Returns when it may be sent once more; raises `lost` if it may not. What was sent back cost nothing."""
        if isinstance(lost, _SentBack):
            now = time.monotonic()
            if not self._sent_back:  # however long it was under way until then
                self._until = now + LEAVING_SECONDS
            self._sent_back += 1
            last = now > self._until
        else:
            self._lost += 1
            last = self._lost == ATTEMPTS
        (self._metrics.lost if last else self._metrics.retried).inc()
        if last:
            raise lost
        if isinstance(lost, _SentBack):
            await asyncio.sleep(min(0.2, 0.01 * 2**self._sent_back))


class _Countdown:
    """`nobody` is set when every request of a call is done with, answered or not."""

    def __init__(self, held: Sequence[_Held]) -> None:
        self.nobody = asyncio.Event()
        self._left = len(held)
        for each in held:
            each.done.add_done_callback(self._one)

    def _one(self, done: asyncio.Future[Answer]) -> None:
        self._left -= 1
        if not self._left:
            self.nobody.set()


def _calls_of(waiting: Sequence[_Held]) -> list[list[_Held]]:
    """The requests in order, those of a call together."""
    calls: list[list[_Held]] = []
    texts = length = 0
    for held in waiting:
        texts, length = texts + held.texts, length + held.characters
        if not calls or held.waits or texts > CALL_TEXTS or length > CALL_CHARACTERS:
            calls.append([])
            texts, length = held.texts, held.characters
        calls[-1].append(held)
        if held.waits:  # by itself, so that it holds up nobody
            texts = CALL_TEXTS
    return calls


def _with_time(held: _Held, now: float) -> RemoteRequest:
    """What is sent: with the time that is left."""
    wanted = held.wanted
    if wanted.timeout is None:
        return wanted
    return replace(wanted, timeout=max(0.0, held.ends - now))


def _epoch(generation: str) -> str:
    return generation.split("-")[0]


async def _result(response: Any) -> Any:
    return await response


def _is_fault(error: RayError) -> bool:
    """Whether the replica lives, and raised what none of ours should."""
    return isinstance(error, RayTaskError) and not isinstance(getattr(error, "cause", None), RayError)
