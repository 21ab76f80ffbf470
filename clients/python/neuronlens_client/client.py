"""The blocking client: it makes the calls of `neuronlens_client.api` on httpx."""

import time
from collections.abc import Iterator, Mapping, Sequence
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


class Client(BaseClient):
    __doc__ = f"""Calls a NeuronLens server and waits for its answers. Threads may share one; close it, or use `with`.

    `http`: an httpx.Client to use (certificates, proxies), which stays its maker's to close.
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
        min_generation: str | None = None,
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
        min_generation: str | None = None,
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
        min_generation: str | None = None,
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
            min_generation: what the server must know of the live state: this generation, as a change gave it, or a
                later one of its epoch.
            timeout: seconds for each request; None: the client's.
            headers: such as `traceparent` or `X-Request-ID`, which the server's log then shows.

        Raises:
            NeuronLensError: no part of a list is answered then.
        """
        fields = {
            "compare": compare,
            "top_k": top_k,
            "activation": activation,
            "truncate": truncate,
            "min_generation": min_generation,
        }
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
        wait: Wait | None = None,
        wait_seconds: float | None = None,
        **settings: Unpack[ErasureSettings],
    ) -> LiveState:
        """Erase a concept from every request that names nothing, or change how.

        Args:
            enforced: from every request, whatever it asks for.
            expires_in: seconds until it ends by itself.
            if_match: only if the live state is at this generation. A change without it is not tried again when it is
                unknown what came of it.
            wait: "all": return when every replica follows the change.
            wait_seconds: how long that may take; None: the server's default of 5.

        Raises:
            ReplicasBehind: the change is made, and some replicas do not follow it yet.
            StaleGeneration: it is at another one. NotFound: no such concept. See NeuronLensError.
        """
        return self._run(
            self._api.switch_on(concept, settings, enforced, reason, expires_in, if_match, (wait, wait_seconds))
        )

    def switch_off(
        self,
        concept: str,
        *,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> LiveState:
        """Erase a concept no more. Where it is off already, nothing changes."""
        return self._run(self._api.switch_off(concept, reason, if_match, (wait, wait_seconds)))

    def replace(
        self,
        erasures: Sequence[str | LiveSpec],
        *,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> LiveState:
        """Replace all that is erased live, in one generation."""
        return self._run(self._api.replace(erasures, reason, if_match, (wait, wait_seconds)))

    def audit(self, limit: int = 100) -> Audit:
        """The last changes of what is live, newest first."""
        return self._run(self._api.audit(limit))

    def replicas(self) -> Replicas:
        """Every process that answers for the model, and the generation that it answers under."""
        return self._run(self._api.replicas())

    def range_sets(self) -> RangeSets:
        """Every published range set, newest first."""
        return self._run(self._api.range_sets())

    def range_set(self, range_set: str) -> RangeSet:
        """Where a range set comes from."""
        return self._run(self._api.range_set(range_set))

    def activate(
        self,
        range_set: str,
        *,
        force: bool = False,
        reason: str | None = None,
        if_match: str | None = None,
        wait: Wait | None = None,
        wait_seconds: float | None = None,
    ) -> LiveState:
        """Make a range set active, or go back to an older one. `force`: drop live erasures that it cannot serve."""
        return self._run(self._api.activate(range_set, force, reason, if_match, (wait, wait_seconds)))

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

    def fit(
        self, data: str | None = None, *, idempotency_key: str | None = None, **settings: Unpack[FitSettings]
    ) -> Job:
        """Fit ranges on texts that the server can read (its `NEURONLENS_FIT_DIRS`), beside it; `wait` for the job.

        Args:
            data: a file, by its path below one of the server's directories.
            idempotency_key: calls with the same one give the same job; None: each call is a job of its own, which a
                retry never doubles.
        """
        return self._run(self._api.fit(data, settings, idempotency_key))

    def job(self, job: str) -> Job:
        """What a fit is doing, how far it is, and how it ended."""
        return self._run(self._api.job(job))

    def jobs(self) -> Jobs:
        """Every fit that waits or runs, and the last that are over, newest first."""
        return self._run(self._api.jobs())

    def cancel(self, job: str) -> Job:
        """End a fit; it publishes nothing. It is `cancelling` until its process has ended."""
        return self._run(self._api.cancel(job))

    def wait(self, job: str, *, timeout: float | None = None, poll: float = 2.0) -> Job:
        """The job when it is over, whichever way: look at its `state` and `error`.

        Args:
            timeout: seconds; None: as long as it takes.
            poll: seconds between two looks.

        Raises:
            DeadlineExceeded: it is not over yet; it goes on.
        """
        return self._run(self._api.wait(job, timeout, poll))

    def reports(self) -> Reports:
        """What `neuronlens evaluate` left where the server looks for reports: the newest 200, newest first."""
        return self._run(self._api.reports())

    def report(self, report: str) -> Report:
        """One report: what it is of, whether it is whole, and its files."""
        return self._run(self._api.report(report))

    def report_file(self, report: str, file: ReportFile) -> bytes:
        """A file of a report: the page, its numbers, or every choice that they were made with."""
        return self._run(self._api.report_file(report, file))

    def tokenize(self, inputs: str | Texts, *, add_special_tokens: bool = True) -> Tokenized:
        """The tokens of up to 64 texts, as the model gets them."""
        return self._run(self._api.tokenize(inputs, add_special_tokens))

    def activations(self, inputs: str | Texts, neurons: Sequence[int], *, layer: int = -1) -> Activations:
        """The values of up to 64 neurons of a block for up to 64 texts, before anything is erased."""
        return self._run(self._api.activations(inputs, neurons, layer))

    def capabilities(self) -> Capabilities:
        """What the server can do, its limits, and what this client's key may do."""
        return self._run(self._api.capabilities())

    def models(self) -> Models:
        """What is loaded."""
        return self._run(self._api.models())

    def ready(self) -> Ready:
        """Whether the server answers; it is asked once.

        Raises:
            Unavailable: not yet, or no more; `problem["checks"]` says why.
        """
        return self._run(self._api.ready())

    def events(self, *, patience: float | None = None) -> Iterator[Event]:
        """What changes, as it does, for as long as one listens: first what is live now.

        A broken connection is made again, and what was told before is not told again.

        Args:
            patience: seconds without a connection after which the error is raised, math.inf for never; None: the
                client's timeout.

        Raises:
            NeuronLensError: the server refuses, or cannot be reached for `patience` seconds.
        """
        following = Following(self._caller, patience)
        while True:
            error: httpx.RequestError | NeuronLensError | None = None
            try:
                with self._http.stream(
                    "GET", following.url, params=following.params, headers=following.headers, timeout=following.timeout
                ) as response:
                    if following.accepts(response):
                        for chunk in response.iter_bytes():
                            yield from following.feed(chunk)
                    else:
                        error = error_of(response.status_code, response.headers, response.read())
            except httpx.RequestError as broken:
                error = broken
            time.sleep(following.pause(error))
