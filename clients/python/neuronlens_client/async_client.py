"""The asynchronous client: the same calls (`neuronlens_client.api`), awaited."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack, overload

import httpx

from neuronlens_client.api import Activation, Ranking, ReportFile, Wait, answer, answers
from neuronlens_client.base import BaseClient, Texts
from neuronlens_client.calls import Outcome, Pause, Send, Steps, T
from neuronlens_client.erasing import CONTEXT, Erase, ErasureSettings, FromContext, LiveSpec
from neuronlens_client.errors import NeuronLensError, error_of
from neuronlens_client.events import Event, Following
from neuronlens_client.fitting import FitSettings
from neuronlens_client.replies import (
    Activations,
    Answer,
    Answers,
    Audit,
    Capabilities,
    Classified,
    Concepts,
    Job,
    Jobs,
    LiveState,
    Models,
    Neuron,
    Overlap,
    Ranges,
    RangeSet,
    RangeSets,
    Ready,
    Replicas,
    Report,
    Reports,
    Tokenized,
)


class AsyncClient(BaseClient):
    __doc__ = f"""Calls a NeuronLens server from asyncio: `Client`'s methods, awaited. Close it, or use `async with`.

    `http`: an httpx.AsyncClient to use, which stays its maker's to close.
    `concurrency`: most requests under way at once for one long list.
    {BaseClient.__doc__}"""

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
        min_generation: str | None = None,
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
        min_generation: str | None = None,
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
        min_generation: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer | Answers:
        """As `Client.classify`; the requests of a long list run `concurrency` at a time, and one failure ends all."""
        fields = {
            "compare": compare,
            "top_k": top_k,
            "activation": activation,
            "truncate": truncate,
            "min_generation": min_generation,
        }
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
        wait: Wait | None = None,
        wait_seconds: float | None = None,
        **settings: Unpack[ErasureSettings],
    ) -> LiveState:
        return await self._run(
            self._api.switch_on(concept, settings, enforced, reason, expires_in, if_match, (wait, wait_seconds))
        )

    async def switch_off(
        self,
        concept: str,
        *,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> LiveState:
        return await self._run(self._api.switch_off(concept, reason, if_match, (wait, wait_seconds)))

    async def replace(
        self,
        erasures: Sequence[str | LiveSpec],
        *,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> LiveState:
        return await self._run(self._api.replace(erasures, reason, if_match, (wait, wait_seconds)))

    async def audit(self, limit: int = 100) -> Audit:
        return await self._run(self._api.audit(limit))

    async def replicas(self) -> Replicas:
        return await self._run(self._api.replicas())

    async def range_sets(self) -> RangeSets:
        return await self._run(self._api.range_sets())

    async def range_set(self, range_set: str) -> RangeSet:
        return await self._run(self._api.range_set(range_set))

    async def activate(
        self,
        range_set: str,
        *,
        force: bool = False,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> LiveState:
        return await self._run(self._api.activate(range_set, force, reason, if_match, (wait, wait_seconds)))

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

    async def fit(
        self, data: str | None = None, *, idempotency_key: str | None = None, **settings: Unpack[FitSettings]
    ) -> Job:
        return await self._run(self._api.fit(data, settings, idempotency_key))

    async def job(self, job: str) -> Job:
        return await self._run(self._api.job(job))

    async def jobs(self) -> Jobs:
        return await self._run(self._api.jobs())

    async def cancel(self, job: str) -> Job:
        return await self._run(self._api.cancel(job))

    async def wait(self, job: str, *, timeout: float | None = None, poll: float = 2.0) -> Job:
        return await self._run(self._api.wait(job, timeout, poll))

    async def reports(self) -> Reports:
        return await self._run(self._api.reports())

    async def report(self, report: str) -> Report:
        return await self._run(self._api.report(report))

    async def report_file(self, report: str, file: ReportFile) -> bytes:
        return await self._run(self._api.report_file(report, file))

    async def tokenize(self, inputs: str | Texts, *, add_special_tokens: bool = True) -> Tokenized:
        return await self._run(self._api.tokenize(inputs, add_special_tokens))

    async def activations(self, inputs: str | Texts, neurons: Sequence[int], *, layer: int = -1) -> Activations:
        return await self._run(self._api.activations(inputs, neurons, layer))

    async def capabilities(self) -> Capabilities:
        return await self._run(self._api.capabilities())

    async def models(self) -> Models:
        return await self._run(self._api.models())

    async def ready(self) -> Ready:
        return await self._run(self._api.ready())

    async def events(self, *, patience: float | None = None) -> AsyncIterator[Event]:
        following = Following(self._caller, patience)
        while True:
            error: httpx.RequestError | NeuronLensError | None = None
            try:
                async with self._http.stream(
                    "GET", following.url, params=following.params, headers=following.headers, timeout=following.timeout
                ) as response:
                    if following.accepts(response):
                        async for chunk in response.aiter_bytes():
                            for event in following.feed(chunk):
                                yield event
                    else:
                        error = error_of(response.status_code, response.headers, await response.aread())
            except httpx.RequestError as broken:
                error = broken
            await asyncio.sleep(following.pause(error))
