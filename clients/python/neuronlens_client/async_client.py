"""The asynchronous client, from which `generate_sync.py` makes the synchronous one."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Self, Unpack, overload
from uuid import uuid4

import httpx
from httpx_sse import aconnect_sse

from neuronlens_client import replies
from neuronlens_client.base import BaseClient, in_batches, wait_params
from neuronlens_client.call import CallOptions, R, parse, path_segment
from neuronlens_client.erasure_context import CONTEXT, FromContext
from neuronlens_client.errors import AccessDenied, DeadlineExceeded, NeuronLensError, NotFound, TooLarge, error_of
from neuronlens_client.events import TIMEOUT, Event, EventStream
from neuronlens_client.gathering import gather  # async only
from neuronlens_client.request_types import (
    ClassifyOptions,
    Erase,
    ErasureSettings,
    FitSettings,
    LiveSpec,
    Ranking,
    ReportFile,
    Texts,
    Wait,
)

DEFAULT_BATCH_SIZE = 256
"""Texts in one request, where the server does not say how many it takes."""
PAGE_SIZE = 1000
"""The most neurons in one page of ranges."""


class AsyncClient(BaseClient):
    """An asynchronous client of a NeuronLens server. Concurrent tasks may share it; close it, or use `async with`.

    Args:
        url: where the server listens, with or without a path before `/v1`.
        api_key: default: the environment variable `NEURONLENS_API_KEY`, if it is set.
        timeout: seconds for each request, its retries included. The server is told, and gives up then too.
        retries: how often a request is repeated: after 429 and 503, and after a broken connection if the request
            changes nothing or is guarded by `if_match`. Pauses grow from ¼ s to 8 s at random, on top of `Retry-After`.
        model: name of the served model; None: the server's default.
        headers: of every request; the server passes `traceparent` on.
        batch_size: texts in one request; None: as many as the server takes.
        concurrency: requests that run at the same time for one long list of texts.
        http: an httpx.AsyncClient to use (for certificates and proxies). It is not closed with this client.

    Raises:
        ValueError: an option is invalid.
    """

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
        if concurrency < 1:  # async only
            raise ValueError("invalid concurrency: expected 1 or more")  # async only
        self._concurrency = concurrency  # async only
        self._owns_http = http is None
        self._http = http or httpx.AsyncClient(trust_env=self._trust_env)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _send(self, method: str, path: str, **options: Unpack[CallOptions]) -> httpx.Response:
        call = self._new_call(method, path, **options)
        attempt = 0
        while True:
            outcome: httpx.Response | httpx.RequestError
            try:
                outcome = await self._http.request(**call.request_arguments())
            except httpx.RequestError as error:
                outcome = error
            if isinstance(outcome, httpx.Response) and outcome.status_code < 300:
                return outcome
            await asyncio.sleep(call.pause_after(outcome, attempt))
            attempt += 1

    async def _call(self, reply: type[R], method: str, path: str, **options: Unpack[CallOptions]) -> R:
        return parse(await self._send(method, path, **options), reply)

    @overload
    async def classify(
        self,
        inputs: str,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> replies.Answer: ...

    @overload
    async def classify(
        self,
        inputs: Texts,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> replies.Answers: ...

    async def classify(
        self,
        inputs: str | Texts,
        *,
        erase: Erase | FromContext | None = CONTEXT,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> replies.Answer | replies.Answers:
        """Classify a text, or a list of texts, which is split into batches if it is long.

        Args:
            erase: what to erase; None: the live erasures; []: nothing. Default: what the enclosing `with client.erase`
                blocks name, or else the live erasures.
            timeout: seconds for each request; None: the client's.
            headers: such as `traceparent`, or `X-Request-ID`, which the server's log then has.
            options: see ClassifyOptions.

        Raises:
            NeuronLensError: the request of a batch failed; the answers of the other batches are lost.
        """
        body = self._classify_body(erase, options)
        if isinstance(inputs, str):
            (one,) = self._batch_headers(headers, 1)
            (reply,) = await self._classify([inputs], body, one, timeout)
            return replies.Answer.of(reply)
        batches = await self._batches(list(inputs))
        calls = [
            partial(self._classify, batch, body, batch_headers, timeout)
            for batch, batch_headers in zip(batches, self._batch_headers(headers, len(batches)), strict=True)
        ]
        results = await gather(calls, self._concurrency)
        return replies.Answers.of([reply for each in results for reply in each])

    async def _batches(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Texts in batches that the server takes."""
        if self._batch_size is None and len(texts) > DEFAULT_BATCH_SIZE:
            try:
                # not as Capabilities, so that servers of other versions are understood
                limits = await self._call(replies.Reply, "GET", "/v1/capabilities")
                self._batch_size = (limits.model_extra or {}).get("max_texts", DEFAULT_BATCH_SIZE)
            except (NotFound, AccessDenied):  # an older server; a key without the scope
                self._batch_size = DEFAULT_BATCH_SIZE
        return in_batches(texts, self._batch_size or DEFAULT_BATCH_SIZE)

    async def _classify(
        self, texts: Sequence[str], body: Mapping[str, Any], headers: Mapping[str, str], timeout: float | None
    ) -> list[replies.ClassifyReply]:
        """The replies to one batch, which is halved where it is too large for the server."""
        try:
            reply = await self._call(
                replies.ClassifyReply,
                "POST",
                "/v1/classify",
                body={"inputs": texts, **body},
                headers=headers,
                repeatable=True,
                timeout=timeout,
            )
        except TooLarge as error:
            if len(texts) == 1 or error.code == "text_too_large":
                raise
            halves = in_batches(texts, (len(texts) + 1) // 2)
            return [reply for half in halves for reply in await self._classify(half, body, headers, timeout)]
        return [reply]

    async def erasures(self) -> replies.LiveState:
        """The live erasures, which apply to requests that name none."""
        return await self._call(replies.LiveState, "GET", "/v1/erasures")

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
    ) -> replies.LiveState:
        """Erase a concept live, or change how it is erased.

        Args:
            enforced: erase it from every request, whatever the request names.
            reason: recorded in the audit log.
            expires_in: seconds until the erasure ends by itself.
            if_match: make the change only if the live state is at this generation. Without it, the change is not
                repeated when its outcome is unknown.
            wait: "all": return when every replica follows the change.
            wait_seconds: how long that may take; None: the server's default of 5.

        Raises:
            ReplicasBehind: the change is made, but some replicas do not follow it yet.
            StaleGeneration: the live state is at another generation than `if_match`.
            NotFound: there is no such concept.
        """
        return await self._call(
            replies.LiveState,
            "PUT",
            f"/v1/erasures/{path_segment(concept)}",
            params=wait_params(wait, wait_seconds),
            body={**settings, "enforced": enforced, "reason": reason, "expires_in": expires_in},
            if_match=if_match,
        )

    async def switch_off(
        self,
        concept: str,
        *,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> replies.LiveState:
        """Stop erasing a concept live. If it is off already, nothing changes. Arguments: see `switch_on`."""
        path, params = f"/v1/erasures/{path_segment(concept)}", {"reason": reason, **wait_params(wait, wait_seconds)}
        return await self._call(replies.LiveState, "DELETE", path, params=params, if_match=if_match)

    async def replace(
        self,
        erasures: Sequence[str | LiveSpec],
        *,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> replies.LiveState:
        """Replace all live erasures in one generation. Arguments: see `switch_on`."""
        specs = [{"concept": each} if isinstance(each, str) else each for each in erasures]
        params, body = wait_params(wait, wait_seconds), {"erasures": specs, "reason": reason}
        return await self._call(replies.LiveState, "PUT", "/v1/erasures", params=params, body=body, if_match=if_match)

    async def audit(self, limit: int = 100) -> replies.Audit:
        """The latest changes of the live state, newest first."""
        return await self._call(replies.Audit, "GET", "/v1/audit", params={"limit": limit})

    async def replicas(self) -> replies.Replicas:
        """Every process that serves the model, with the generation that it uses."""
        return await self._call(replies.Replicas, "GET", "/v1/replicas")

    async def range_sets(self) -> replies.RangeSets:
        """Every published range set, newest first."""
        return await self._call(replies.RangeSets, "GET", "/v1/range-sets")

    async def range_set(self, range_set: str) -> replies.RangeSet:
        """One range set, with its provenance."""
        return await self._call(replies.RangeSet, "GET", f"/v1/range-sets/{path_segment(range_set)}")

    async def activate(
        self,
        range_set: str,
        *,
        force: bool = False,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> replies.LiveState:
        """Make a range set the active one. Arguments: see `switch_on`.

        Args:
            force: drop live erasures that cannot be resolved on it; otherwise they are a Conflict.
        """
        params, body = wait_params(wait, wait_seconds), {"id": range_set, "force": force, "reason": reason}
        return await self._call(
            replies.LiveState, "PUT", "/v1/range-sets/active", params=params, body=body, if_match=if_match
        )

    async def concepts(self) -> replies.Concepts:
        """The concepts of the active range set, and whether each is erased live."""
        return await self._call(replies.Concepts, "GET", "/v1/concepts")

    async def ranges(
        self, concept: str, *, layer: int = -1, ranking: Ranking = "max", tau: float = 2.5, limit: int | None = None
    ) -> replies.Ranges:
        """A concept's neurons by rank, each with its range: the first `limit`, or all (read in pages of 1,000)."""
        path, params = f"/v1/concepts/{path_segment(concept)}/ranges", {"layer": layer, "ranking": ranking, "tau": tau}
        neurons: list[Any] = []
        cursor = None
        while True:
            size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(neurons))
            page = await self._call(replies.Ranges, "GET", path, params={**params, "limit": size, "cursor": cursor})
            neurons += page.neurons
            cursor = page.next_cursor
            if cursor is None or len(neurons) == limit:
                return page.model_copy(update={"neurons": tuple(neurons)})

    async def neuron(self, layer: int, neuron: int, *, tau: float = 2.5) -> replies.Neuron:
        """One neuron, with every concept's statistics, range and histogram."""
        return await self._call(replies.Neuron, "GET", f"/v1/neurons/{layer}/{neuron}", params={"tau": tau})

    async def overlap(self, *, layer: int = -1, top_fraction: float = 0.3, ranking: Ranking = "max") -> replies.Overlap:
        """How many of their salient neurons the concepts share."""
        params = {"layer": layer, "top_fraction": top_fraction, "ranking": ranking}
        return await self._call(replies.Overlap, "GET", "/v1/overlap", params=params)

    async def fit(
        self, data: str | None = None, *, idempotency_key: str | None = None, **settings: Unpack[FitSettings]
    ) -> replies.Job:
        """Start a fit on the server; `wait` returns its outcome.

        Args:
            data: path of a file of texts, relative to one of the server's `NEURONLENS_FIT_DIRS`.
            idempotency_key: calls with the same key return the same job. Default: a new key, so that each call starts
                one job, however often it is repeated.
        """
        headers = {"idempotency-key": uuid4().hex if idempotency_key is None else idempotency_key}
        return await self._call(
            replies.Job, "POST", "/v1/fits", body={"data": data, **settings}, headers=headers, repeatable=True
        )

    async def job(self, job: str) -> replies.Job:
        """The state of a fit: its progress, and how it ended."""
        return await self._call(replies.Job, "GET", f"/v1/jobs/{path_segment(job)}")

    async def jobs(self) -> replies.Jobs:
        """Every fit that waits or runs, and the latest that have ended, newest first."""
        return await self._call(replies.Jobs, "GET", "/v1/jobs")

    async def cancel(self, job: str) -> replies.Job:
        """Cancel a fit; it publishes nothing. Its state is "cancelling" until its process has ended."""
        return await self._call(replies.Job, "DELETE", f"/v1/jobs/{path_segment(job)}", repeatable=True)

    async def wait(self, job: str, *, timeout: float | None = None, poll: float = 2.0) -> replies.Job:
        """The job when it has ended, whichever way: see its `state` and `error`.

        Args:
            timeout: seconds; None: as long as it takes.
            poll: seconds between two requests; the first ones follow each other faster.

        Raises:
            DeadlineExceeded: the job has not ended yet; it goes on.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        pause = min(0.1, poll)
        while True:
            found = await self.job(job)
            if found.ended:
                return found
            if time.monotonic() + pause > deadline:
                raise DeadlineExceeded(f"job {job} is still {found.state}")
            await asyncio.sleep(pause)
            pause = min(pause * 2, poll)

    async def reports(self) -> replies.Reports:
        """The newest 200 reports of `neuronlens evaluate` in the server's `NEURONLENS_REPORTS_DIR`, newest first."""
        return await self._call(replies.Reports, "GET", "/v1/reports")

    async def report(self, report: str) -> replies.Report:
        """One report: what was measured, whether it is complete, and its files."""
        return await self._call(replies.Report, "GET", f"/v1/reports/{path_segment(report)}")

    async def report_file(self, report: str, file: ReportFile) -> bytes:
        """A file of a report: the page, its numbers, or the settings that they were made with."""
        response = await self._send("GET", f"/v1/reports/{path_segment(report)}/{path_segment(file)}")
        return response.content

    async def tokenize(self, inputs: str | Texts, *, add_special_tokens: bool = True) -> replies.Tokens:
        """The tokens of up to 64 texts, as the model gets them."""
        body = {"inputs": inputs, "add_special_tokens": add_special_tokens}
        return await self._call(replies.Tokens, "POST", "/v1/tokenize", body=body, repeatable=True)

    async def activations(self, inputs: str | Texts, neurons: Sequence[int], *, layer: int = -1) -> replies.Activations:
        """The values of up to 64 neurons of one block for up to 64 texts, without erasure."""
        body = {"inputs": inputs, "neurons": list(neurons), "layer": layer}
        return await self._call(replies.Activations, "POST", "/v1/activations", body=body, repeatable=True)

    async def capabilities(self) -> replies.Capabilities:
        """What the server can do, its limits, and what this client's key may do."""
        return await self._call(replies.Capabilities, "GET", "/v1/capabilities")

    async def models(self) -> replies.Models:
        """The models that the server has loaded."""
        return await self._call(replies.Models, "GET", "/v1/models")

    async def ready(self) -> replies.Ready:
        """Whether the server is ready to answer. This call is never repeated.

        Raises:
            Unavailable: it is not ready; `problem["checks"]` says why.
        """
        return await self._call(replies.Ready, "GET", "/readyz", retries=0)

    async def events(self, *, reconnect_timeout: float | None = None) -> AsyncIterator[Event]:
        """Changes on the server as they happen, without end; the first event is the current live state.

        A broken connection is made again, and what was received before is not repeated.

        Args:
            reconnect_timeout: seconds without a connection after which the error is raised; math.inf: never; None: the
                client's timeout.

        Raises:
            NeuronLensError: the server refuses, or could not be reached for so long.
        """
        url = f"{self._url}/v1/events"
        stream = EventStream(url, self._timeout if reconnect_timeout is None else reconnect_timeout)
        while True:
            error: httpx.RequestError | NeuronLensError | None = None
            try:
                async with aconnect_sse(
                    self._http, "GET", url, params=self._query, headers=dict(self._headers), timeout=TIMEOUT
                ) as source:
                    if (response := source.response).status_code < 300:
                        async for sent in source.aiter_sse():
                            if (event := stream.receive(sent)) is not None:
                                yield event
                    else:
                        error = error_of(response.status_code, response.headers, await response.aread())
            except httpx.RequestError as broken:
                error = broken
            await asyncio.sleep(stream.pause_after(error))
