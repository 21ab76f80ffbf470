"""The clients: a blocking and an asynchronous one, which make the same calls (`neuronlens.api`) on httpx."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self, Unpack, overload

import httpx

from neuronlens.api import Activation, Api, Ranking, answer, answers
from neuronlens.calls import Caller, Outcome, Pause, Send, Steps, T
from neuronlens.erasing import (
    CONTEXT,
    Erase,
    Erasing,
    ErasureSettings,
    ErasureSpec,
    FromContext,
    LiveSpec,
    specs,
)
from neuronlens.replies import (
    Answer,
    Answers,
    Audit,
    Classified,
    Concepts,
    LiveState,
    Models,
    Neuron,
    Overlap,
    Ranges,
    RangeSet,
    RangeSets,
    Ready,
)

Texts = list[str] | tuple[str, ...]
"""Not any sequence of str: a str is one, and is answered otherwise."""

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class _Client:
    """What both clients are made of.

    Args:
        url: where the server listens, with or without a path before `/v1`.
        api_key: None: what `NEURONLENS_API_KEY` holds, if anything.
        timeout: seconds for each request, its retries included. The server is told, and gives up then too.
        retries: how often a request is tried again: after 429 and 503, and after a lost connection if it changes
            nothing or is guarded by `if_match`. Pauses grow from ¼ s to 8 s at random, on top of `Retry-After`.
        model: the served name that is meant; None: the server's only one.
        headers: for every request; `traceparent` is passed on by the server.
        batch_size: texts of one request; None: as many as the server takes.

    Raises:
        ValueError: no such URL, key, timeout or number of retries.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout: float,
        retries: int,
        model: str | None,
        headers: Mapping[str, str] | None,
        batch_size: int | None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError("batch_size must be 1 or more")
        key = os.environ.get("NEURONLENS_API_KEY") if api_key is None else api_key
        self._caller = Caller(url, key or None, timeout, retries, model, headers or {})
        self._api = Api(self._caller, batch_size)

    @property
    def _trust_env(self) -> bool:
        # a proxy of the environment is for the world outside, not for this machine
        return self._caller.host not in _LOOPBACK

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._caller.shown}>"

    def erase(self, *concepts: str | ErasureSpec, **settings: Unpack[ErasureSettings]) -> Erasing:
        """A `with` block in which this client's requests erase concepts, in this thread or task only.

        Inner blocks add to outer ones, and win where they differ; a block without concepts erases nothing. An `erase=`
        of a single call wins over all blocks. What is live on the server is never changed.

        >>> with client.erase("Sports", tau=2):
        ...     client.classify("The coach praised the goalkeeper.")
        """
        return Erasing(self._api, specs(concepts, settings))


class Client(_Client):
    __doc__ = f"""Calls a NeuronLens server and waits for its answers. Threads may share one; close it, or use `with`.

    `http`: an httpx.Client to use (certificates, proxies), which stays its maker's to close.
    {_Client.__doc__}"""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        batch_size: int | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        super().__init__(url, api_key, timeout, retries, model, headers, batch_size)
        self._own = http is None
        self._http = http or httpx.Client(trust_env=self._trust_env)

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            match step:
                case Pause(seconds):
                    time.sleep(seconds)
                    outcome = None
                case Send():
                    try:
                        outcome = self._http.request(
                            step.method,
                            step.url,
                            params=step.params,
                            content=step.content,
                            headers=step.headers,
                            timeout=step.timeout,
                        )
                    except httpx.RequestError as error:
                        outcome = error

    @overload
    def classify(
        self,
        inputs: str,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        compare: bool = False,
        top_k: int | None = None,
        activation: Activation = "auto",
        truncate: bool = True,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer: ...

    @overload
    def classify(
        self,
        inputs: Texts,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        compare: bool = False,
        top_k: int | None = None,
        activation: Activation = "auto",
        truncate: bool = True,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answers: ...

    def classify(
        self,
        inputs: str | Texts,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        compare: bool = False,
        top_k: int | None = None,
        activation: Activation = "auto",
        truncate: bool = True,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer | Answers:
        """Classify a text, or a list of texts (long ones in several requests, one after the other).

        Args:
            erase: what to erase; None: what is live on the server; []: nothing. Default: what the `with client.erase`
                blocks around say, else what is live.
            compare: answer without erasure beside it, as `baseline`.
            top_k: best labels to give; None: all.
            truncate: cut texts that are too long for the model; else they are an error.
            timeout: seconds for each request; None: the client's.
            headers: such as `traceparent` or `X-Request-ID`, which the server's log then shows.

        Raises:
            NeuronLensError: no part of a list is answered then.
        """
        fields = {"compare": compare, "top_k": top_k, "activation": activation, "truncate": truncate}
        request = self._api.request(erase, fields)
        one = isinstance(inputs, str)
        parts = [[inputs]] if isinstance(inputs, str) else self._run(self._api.batches(list(inputs)))
        replies: list[Classified] = []
        for part, of_part in zip(parts, self._api.with_ids(headers, len(parts)), strict=True):
            replies += self._run(self._api.classify(part, request, of_part, timeout))
        return answer(replies) if one else answers(replies)

    def erasures(self) -> LiveState:
        """What is erased when a request names nothing."""
        return self._run(self._api.erasures())

    def switch_on(
        self,
        concept: str,
        *,
        enforced: bool = False,
        reason: str | None = None,
        expires_in: float | None = None,
        if_match: str | None = None,
        **settings: Unpack[ErasureSettings],
    ) -> LiveState:
        """Erase a concept from every request that names nothing, or change how.

        Args:
            enforced: from every request, whatever it asks for.
            expires_in: seconds until it ends by itself.
            if_match: only if the live state is at this generation. A change without it is not tried again when it is
                unknown what came of it.

        Raises:
            Stale: it is at another one. NotFound: no such concept. Invalid: not fitted so. See NeuronLensError.
        """
        return self._run(self._api.switch_on(concept, settings, enforced, reason, expires_in, if_match))

    def switch_off(self, concept: str, *, reason: str | None = None, if_match: str | None = None) -> LiveState:
        """Erase a concept no more. Where it is off already, nothing changes."""
        return self._run(self._api.switch_off(concept, reason, if_match))

    def replace(
        self, erasures: Sequence[str | LiveSpec], *, reason: str | None = None, if_match: str | None = None
    ) -> LiveState:
        """Replace all that is erased live, in one generation."""
        return self._run(self._api.replace(erasures, reason, if_match))

    def audit(self, limit: int = 100) -> Audit:
        """The last changes of what is live, newest first."""
        return self._run(self._api.audit(limit))

    def range_sets(self) -> RangeSets:
        """Every published range set, newest first."""
        return self._run(self._api.range_sets())

    def range_set(self, range_set: str) -> RangeSet:
        """Where a range set comes from."""
        return self._run(self._api.range_set(range_set))

    def activate(
        self, range_set: str, *, force: bool = False, reason: str | None = None, if_match: str | None = None
    ) -> LiveState:
        """Make a range set active, or go back to an older one. `force`: drop live erasures that it cannot serve."""
        return self._run(self._api.activate(range_set, force, reason, if_match))

    def concepts(self) -> Concepts:
        """The concepts of the active range set, and whether each is erased now."""
        return self._run(self._api.concepts())

    def ranges(
        self, concept: str, *, layer: int = -1, ranking: Ranking = "max", tau: float = 2.5, limit: int | None = None
    ) -> Ranges:
        """A concept's neurons by rank, each with its range: the first `limit` ones, or all (in pages of 1,000)."""
        return self._run(self._api.ranges(concept, layer, ranking, tau, limit))

    def neuron(self, layer: int, neuron: int, *, tau: float = 2.5) -> Neuron:
        """One neuron: every concept's statistics, range and histogram."""
        return self._run(self._api.neuron(layer, neuron, tau))

    def overlap(self, *, layer: int = -1, top_fraction: float = 0.3, ranking: Ranking = "max") -> Overlap:
        """How far the concepts share their salient neurons."""
        return self._run(self._api.overlap(layer, top_fraction, ranking))

    def models(self) -> Models:
        """What is loaded."""
        return self._run(self._api.models())

    def ready(self) -> Ready:
        """Whether the server answers; it is asked once.

        Raises:
            Unavailable: not yet, or no more; `problem["checks"]` says why.
        """
        return self._run(self._api.ready())


class AsyncClient(_Client):
    __doc__ = f"""Calls a NeuronLens server from asyncio: `Client`'s methods, awaited. Close it, or use `async with`.

    `http`: an httpx.AsyncClient to use, which stays its maker's to close.
    `concurrency`: most requests under way at once for one long list.
    {_Client.__doc__}"""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        batch_size: int | None = None,
        concurrency: int = 4,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(url, api_key, timeout, retries, model, headers, batch_size)
        if concurrency < 1:
            raise ValueError("concurrency must be 1 or more")
        self._concurrency = concurrency
        self._own = http is None
        self._http = http or httpx.AsyncClient(trust_env=self._trust_env)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            match step:
                case Pause(seconds):
                    await asyncio.sleep(seconds)
                    outcome = None
                case Send():
                    try:
                        outcome = await self._http.request(
                            step.method,
                            step.url,
                            params=step.params,
                            content=step.content,
                            headers=step.headers,
                            timeout=step.timeout,
                        )
                    except httpx.RequestError as error:
                        outcome = error

    @overload
    async def classify(
        self,
        inputs: str,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        compare: bool = False,
        top_k: int | None = None,
        activation: Activation = "auto",
        truncate: bool = True,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer: ...

    @overload
    async def classify(
        self,
        inputs: Texts,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        compare: bool = False,
        top_k: int | None = None,
        activation: Activation = "auto",
        truncate: bool = True,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answers: ...

    async def classify(
        self,
        inputs: str | Texts,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        compare: bool = False,
        top_k: int | None = None,
        activation: Activation = "auto",
        truncate: bool = True,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer | Answers:
        """As `Client.classify`; the requests of a long list run `concurrency` at a time, and one failure ends all."""
        fields = {"compare": compare, "top_k": top_k, "activation": activation, "truncate": truncate}
        request = self._api.request(erase, fields)
        if isinstance(inputs, str):
            (of_call,) = self._api.with_ids(headers, 1)
            return answer(await self._run(self._api.classify([inputs], request, of_call, timeout)))
        parts = await self._run(self._api.batches(list(inputs)))
        free = asyncio.Semaphore(self._concurrency)

        async def of_one(part: Sequence[str], of_part: Mapping[str, str]) -> list[Classified]:
            async with free:
                return await self._run(self._api.classify(part, request, of_part, timeout))

        try:
            async with asyncio.TaskGroup() as group:
                numbered = zip(parts, self._api.with_ids(headers, len(parts)), strict=True)
                tasks = [group.create_task(of_one(part, of_part)) for part, of_part in numbered]
        except BaseExceptionGroup as failed:  # the first one, as a single request would raise it
            raise failed.exceptions[0] from None
        return answers([reply for task in tasks for reply in task.result()])

    async def erasures(self) -> LiveState:
        return await self._run(self._api.erasures())

    async def switch_on(
        self,
        concept: str,
        *,
        enforced: bool = False,
        reason: str | None = None,
        expires_in: float | None = None,
        if_match: str | None = None,
        **settings: Unpack[ErasureSettings],
    ) -> LiveState:
        return await self._run(self._api.switch_on(concept, settings, enforced, reason, expires_in, if_match))

    async def switch_off(self, concept: str, *, reason: str | None = None, if_match: str | None = None) -> LiveState:
        return await self._run(self._api.switch_off(concept, reason, if_match))

    async def replace(
        self, erasures: Sequence[str | LiveSpec], *, reason: str | None = None, if_match: str | None = None
    ) -> LiveState:
        return await self._run(self._api.replace(erasures, reason, if_match))

    async def audit(self, limit: int = 100) -> Audit:
        return await self._run(self._api.audit(limit))

    async def range_sets(self) -> RangeSets:
        return await self._run(self._api.range_sets())

    async def range_set(self, range_set: str) -> RangeSet:
        return await self._run(self._api.range_set(range_set))

    async def activate(
        self, range_set: str, *, force: bool = False, reason: str | None = None, if_match: str | None = None
    ) -> LiveState:
        return await self._run(self._api.activate(range_set, force, reason, if_match))

    async def concepts(self) -> Concepts:
        return await self._run(self._api.concepts())

    async def ranges(
        self, concept: str, *, layer: int = -1, ranking: Ranking = "max", tau: float = 2.5, limit: int | None = None
    ) -> Ranges:
        return await self._run(self._api.ranges(concept, layer, ranking, tau, limit))

    async def neuron(self, layer: int, neuron: int, *, tau: float = 2.5) -> Neuron:
        return await self._run(self._api.neuron(layer, neuron, tau))

    async def overlap(self, *, layer: int = -1, top_fraction: float = 0.3, ranking: Ranking = "max") -> Overlap:
        return await self._run(self._api.overlap(layer, top_fraction, ranking))

    async def models(self) -> Models:
        return await self._run(self._api.models())

    async def ready(self) -> Ready:
        return await self._run(self._api.ready())
