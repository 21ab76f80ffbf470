"""Calls of an ingress to the replicas of a fleet: requests that arrive together share a call. Does not load torch.

A call costs each side about a millisecond of CPU, so requests are gathered here, before they are sent. `@serve.batch`
gathers them in the replica, after each has paid for a call of its own; there the engine batches by tokens already.
Which replica gets a call is Serve's choice.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Histogram
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from workers.cluster.errors import first_line
from workers.cluster.messages import CallReply, PackedAnswer, RemoteRequest
from workers.engine.answers import Answer, Load
from workers.engine.errors import Draining, EngineFailed, QueueFull, ReplicaLost

PAUSE_SECONDS = 0.003
"""Minimum time between two rounds of calls while any call is under way."""
CALL_TEXTS = 64
"""Maximum texts of a call with several requests: a call takes as long as its slowest request."""
CALL_CHARACTERS = 16_384
"""Maximum characters of a call with several requests."""
LOAD_SECONDS = 1.0
"""How long the load that a replica reported with a reply is taken for its current one."""


class ReturnedUnread(ReplicaLost):
    """A replica that is stopping did not start the request."""


@dataclass(eq=False)
class PendingRequest:
    """A request that waits to be sent, or for its answer.

    Attributes:
        alone: it may have to wait for its generation, so it gets a call of its own.
        done: its answer, an error of the engine, or `ReplicaLost`.
    """

    request: RemoteRequest
    texts: int
    characters: int
    alone: bool
    done: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class ReplicaCalls:
    """Sends requests to the replicas behind a handle.

    Args:
        handle: handle of the Serve application.
        sizes: observes how many requests each call has.
    """

    def __init__(self, handle: Any, sizes: Histogram) -> None:
        self.failure: str | None = None
        self._handle, self._sizes = handle, sizes
        self._waiting: list[PendingRequest] = []
        self._sending: asyncio.Handle | None = None
        self._next_at = 0.0
        self._calls: set[asyncio.Task[None]] = set()
        self._results: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loads: dict[str, tuple[float, Load]] = {}

    @property
    def loads(self) -> list[Load]:
        """The load of each replica that replied less than `LOAD_SECONDS` ago."""
        now = time.monotonic()
        self._loads = {name: (at, load) for name, (at, load) in self._loads.items() if now - at < LOAD_SECONDS}
        return [load for _, load in self._loads.values()]

    def fail_all(self, reason: str) -> None:
        """Let all calls, now and later, raise ReplicaLost. May be called from any thread."""
        self.failure = reason
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(lambda: [result.cancel() for result in self._results])

    async def send(self, request: PendingRequest) -> Answer:
        """Send a request, together with others that wait.

        It is sent at the end of this turn of the event loop if no call is under way, else a little later.

        Raises:
            ReplicaLost, ReturnedUnread: it may be sent again.
            Exception: the error that the engine raised, see `workers.engine.engine.Engine.classify`.
        """
        self._waiting.append(request)
        if self._sending is None:
            loop = asyncio.get_running_loop()
            pause = self._next_at - time.monotonic() if self._calls else 0.0
            self._sending = loop.call_later(pause, self._send) if pause > 0 else loop.call_soon(self._send)
        return await request.done

    def _send(self) -> None:
        self._sending = None
        self._next_at = time.monotonic() + PAUSE_SECONDS
        waiting = [request for request in self._waiting if not request.done.done()]
        self._waiting.clear()
        for requests in _grouped(waiting):
            task = asyncio.get_running_loop().create_task(self._classify(requests))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
            self._cancel_when_unused(task, requests)

    @staticmethod
    def _cancel_when_unused(task: asyncio.Task[None], requests: Sequence[PendingRequest]) -> None:
        """Cancel a call as soon as nobody waits for any of its requests."""
        left = len(requests)

        def count_down(done: asyncio.Future[Answer]) -> None:
            nonlocal left
            left -= 1
            if not left:
                task.cancel()  # has no effect after the reply

        for request in requests:
            request.done.add_done_callback(count_down)

    async def _classify(self, requests: Sequence[PendingRequest]) -> None:
        """One call. Every request gets its answer, its own error, or `ReplicaLost`."""
        self._sizes.observe(len(requests))
        try:
            reply: CallReply = await self.call("classify", [each.request for each in requests])
        except Exception as error:
            for request in requests:
                request.fail(error)
            return
        self._loads[reply.replica] = (time.monotonic(), reply.load)
        if reply.ending:
            del self._loads[reply.replica]
        for request, outcome in zip(requests, reply.outcomes, strict=True):
            if isinstance(outcome, PackedAnswer):
                if not request.done.done():
                    request.done.set_result(outcome.unpack(reply.replica))
                continue
            refusal = outcome.unpack()
            if isinstance(refusal, Draining):
                refusal = ReturnedUnread(str(refusal))
            elif reply.ending and isinstance(refusal, EngineFailed):
                refusal = ReplicaLost(str(refusal))
            request.fail(refusal)

    async def call(self, method: str, *arguments: Any) -> Any:
        """The result of a replica's method. If the caller is cancelled, so is the call.

        Raises:
            ReplicaLost: the replica was lost, or there is none.
            QueueFull: too many calls wait for a replica.
            EngineFailed: a fault of the program.
        """
        if self.failure is not None:
            raise ReplicaLost(self.failure)
        self._loop = asyncio.get_running_loop()
        response = getattr(self._handle, method).remote(*arguments)
        result = asyncio.ensure_future(_result(response))
        self._results.add(result)
        result.add_done_callback(self._results.discard)
        try:
            return await result
        except asyncio.CancelledError:
            with suppress(Exception):
                response.cancel()
            if self.failure is not None:
                raise ReplicaLost(self.failure) from None
            raise
        except BackPressureError:
            raise QueueFull(1.0) from None
        except TaskCancelledError:
            raise ReplicaLost("the replica cancelled the request") from None
        except RayError as error:
            if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):  # the method raised it
                raise EngineFailed(f"an internal error in a replica: {first_line(error)}") from None
            raise ReplicaLost(first_line(error)) from None
        except RayServeException as error:
            raise ReplicaLost(first_line(error)) from None


async def _result(response: Any) -> Any:
    return await response


def _grouped(requests: Sequence[PendingRequest]) -> list[list[PendingRequest]]:
    """The requests of each call, in order."""
    calls: list[list[PendingRequest]] = []
    texts = characters = 0
    for request in requests:
        texts, characters = texts + request.texts, characters + request.characters
        if not calls or request.alone or texts > CALL_TEXTS or characters > CALL_CHARACTERS:
            calls.append([])
            texts, characters = request.texts, request.characters
        calls[-1].append(request)
        if request.alone:
            texts = CALL_TEXTS
    return calls
