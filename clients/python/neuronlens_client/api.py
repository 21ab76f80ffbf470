"""Every call of `/v1` as steps (`neuronlens_client.calls`): paths, fields and what the answer is."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import uuid4

from neuronlens_client.calls import Caller, Pause, Steps, in_path
from neuronlens_client.erasing import CONTEXT, Erase, ErasureSettings, FromContext, LiveSpec, erased_here, listed
from neuronlens_client.errors import AccessDenied, DeadlineExceeded, NotFound, TooLarge
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
    Reply,
    Report,
    Reports,
    Tokenized,
    Usage,
)

Activation = Literal["auto", "softmax", "sigmoid", "none"]
Ranking = Literal["max", "probe", "probeless", "probeless_global", "selectivity"]
Wait = Literal["all"]
Waiting = tuple[Wait | None, float | None]
"""Whether a change is answered only when every replica follows it, and how many seconds that may take."""
ReportFile = Literal["report.html", "results.csv", "run.json"]

BATCH = 256
"""Texts of one request, where the server does not tell how many it takes."""
PAGE = 1000
"""Most neurons of one page of ranges."""


class Limits(Reply):
    """The part of `GET /v1/capabilities` that batching needs."""

    max_texts: int | None = None


class Api:
    """The calls of one client."""

    def __init__(self, caller: Caller, batch_size: int | None) -> None:
        self.caller = caller
        self._batch_size = batch_size

    # classify

    def request(self, erase: Erase | FromContext | None, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body of `POST /v1/classify` without its texts. It is made where the caller is: blocks are known there."""
        chosen = erased_here(self) if erase is CONTEXT else erase
        body = {name: value for name, value in fields.items() if value is not None}
        return body if chosen is None else {**body, "erase": listed(chosen)}

    def with_ids(self, headers: Mapping[str, str] | None, parts: int) -> list[dict[str, str]]:
        """The headers of each request of one call: one id, with a number where there are several requests."""
        given = self.caller.headers | {name.lower(): value for name, value in (headers or {}).items()}
        of_call = given.get("x-request-id", uuid4().hex)
        return [given | {"x-request-id": f"{of_call}.{part}" if parts > 1 else of_call} for part in range(parts)]

    def batches(self, texts: Sequence[str]) -> Steps[list[Sequence[str]]]:
        """A list in parts that the server takes; an empty list is one part."""
        if self._batch_size is None and len(texts) > BATCH:
            try:
                limits = yield from self.caller.call("GET", "/v1/capabilities", Limits)
                self._batch_size = limits.max_texts or BATCH
            except (NotFound, AccessDenied):  # an older server; a key that may infer only
                self._batch_size = BATCH
        size = self._batch_size or BATCH
        return [texts[start : start + size] for start in range(0, max(len(texts), 1), size)]

    def classify(
        self,
        texts: Sequence[str],
        request: Mapping[str, Any],
        headers: Mapping[str, str],
        timeout: float | None,
    ) -> Steps[list[Classified]]:
        """One batch; what is too large for the server goes in halves."""
        try:
            reply = yield from self.caller.call(
                "POST",
                "/v1/classify",
                Classified,
                body={"inputs": texts, **request},
                headers=headers,
                repeatable=True,
                timeout=timeout,
            )
        except TooLarge as error:
            if len(texts) == 1 or error.code == "text_too_large":
                raise
            middle = len(texts) // 2
            first = yield from self.classify(texts[:middle], request, headers, timeout)
            return first + (yield from self.classify(texts[middle:], request, headers, timeout))
        return [reply]

    # live erasures

    def erasures(self) -> Steps[LiveState]:
        return self.caller.call("GET", "/v1/erasures", LiveState)

    def switch_on(
        self,
        concept: str,
        settings: ErasureSettings,
        enforced: bool,
        reason: str | None,
        expires_in: float | None,
        if_match: str | None,
        waiting: Waiting,
    ) -> Steps[LiveState]:
        body = {**settings, "enforced": enforced, "reason": reason, "expires_in": expires_in}
        path = f"/v1/erasures/{in_path(concept)}"
        return self.caller.call("PUT", path, LiveState, params=_waits(waiting), body=body, if_match=if_match)

    def switch_off(self, concept: str, reason: str | None, if_match: str | None, waiting: Waiting) -> Steps[LiveState]:
        path, params = f"/v1/erasures/{in_path(concept)}", {"reason": reason, **_waits(waiting)}
        return self.caller.call("DELETE", path, LiveState, params=params, if_match=if_match)

    def replace(
        self, erasures: Sequence[str | LiveSpec], reason: str | None, if_match: str | None, waiting: Waiting
    ) -> Steps[LiveState]:
        named = [{"concept": each} if isinstance(each, str) else each for each in erasures]
        body = {"erasures": named, "reason": reason}
        return self.caller.call("PUT", "/v1/erasures", LiveState, params=_waits(waiting), body=body, if_match=if_match)

    def audit(self, limit: int) -> Steps[Audit]:
        return self.caller.call("GET", "/v1/audit", Audit, params={"limit": limit})

    # range sets

    def range_sets(self) -> Steps[RangeSets]:
        return self.caller.call("GET", "/v1/range-sets", RangeSets)

    def range_set(self, range_set: str) -> Steps[RangeSet]:
        return self.caller.call("GET", f"/v1/range-sets/{in_path(range_set)}", RangeSet)

    def activate(
        self, range_set: str, force: bool, reason: str | None, if_match: str | None, waiting: Waiting
    ) -> Steps[LiveState]:
        body, path = {"id": range_set, "force": force, "reason": reason}, "/v1/range-sets/active"
        return self.caller.call("PUT", path, LiveState, params=_waits(waiting), body=body, if_match=if_match)

    def replicas(self) -> Steps[Replicas]:
        return self.caller.call("GET", "/v1/replicas", Replicas)

    def concepts(self) -> Steps[Concepts]:
        return self.caller.call("GET", "/v1/concepts", Concepts)

    def ranges(self, concept: str, layer: int, ranking: Ranking, tau: float, limit: int | None) -> Steps[Ranges]:
        """Page by page, until `limit` or the last neuron."""
        path = f"/v1/concepts/{in_path(concept)}/ranges"
        asked: dict[str, Any] = {"layer": layer, "ranking": ranking, "tau": tau}
        found: list[Any] = []
        cursor = None
        while True:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = yield from self.caller.call("GET", path, Ranges, params={**asked, "limit": size, "cursor": cursor})
            found += page.neurons
            cursor = page.next_cursor
            if cursor is None or len(found) == limit:
                return page.model_copy(update={"neurons": tuple(found)})

    def neuron(self, layer: int, neuron: int, tau: float) -> Steps[Neuron]:
        return self.caller.call("GET", f"/v1/neurons/{layer}/{neuron}", Neuron, params={"tau": tau})

    def overlap(self, layer: int, top_fraction: float, ranking: Ranking) -> Steps[Overlap]:
        asked = {"layer": layer, "top_fraction": top_fraction, "ranking": ranking}
        return self.caller.call("GET", "/v1/overlap", Overlap, params=asked)

    # fits

    def fit(self, data: str | None, settings: Mapping[str, Any], idempotency_key: str | None) -> Steps[Job]:
        """The key makes one job of one call, however often it is sent."""
        headers = {"idempotency-key": uuid4().hex if idempotency_key is None else idempotency_key}
        body = {"data": data, **settings}
        return self.caller.call("POST", "/v1/fits", Job, body=body, headers=headers, repeatable=True)

    def job(self, job: str) -> Steps[Job]:
        return self.caller.call("GET", f"/v1/jobs/{in_path(job)}", Job)

    def jobs(self) -> Steps[Jobs]:
        return self.caller.call("GET", "/v1/jobs", Jobs)

    def cancel(self, job: str) -> Steps[Job]:
        return self.caller.call("DELETE", f"/v1/jobs/{in_path(job)}", Job, repeatable=True)

    def wait(self, job: str, timeout: float | None, poll: float) -> Steps[Job]:
        """Ask until it is over: soon at first, then every `poll` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        pause = min(0.1, poll)
        while True:
            found = yield from self.job(job)
            if found.over:
                return found
            if time.monotonic() + pause > deadline:
                raise DeadlineExceeded(f"job {job} is still {found.state}")
            yield Pause(pause)
            pause = min(pause * 2, poll)

    # reports

    def reports(self) -> Steps[Reports]:
        return self.caller.call("GET", "/v1/reports", Reports)

    def report(self, report: str) -> Steps[Report]:
        return self.caller.call("GET", f"/v1/reports/{in_path(report)}", Report)

    def report_file(self, report: str, file: ReportFile) -> Steps[bytes]:
        found = yield from self.caller.fetch("GET", f"/v1/reports/{in_path(report)}/{in_path(file)}")
        return found.content

    # a text

    def tokenize(self, inputs: str | list[str] | tuple[str, ...], special: bool) -> Steps[Tokenized]:
        body = {"inputs": inputs, "add_special_tokens": special}
        return self.caller.call("POST", "/v1/tokenize", Tokenized, body=body, repeatable=True)

    def activations(
        self, inputs: str | list[str] | tuple[str, ...], neurons: Sequence[int], layer: int
    ) -> Steps[Activations]:
        body = {"inputs": inputs, "neurons": list(neurons), "layer": layer}
        return self.caller.call("POST", "/v1/activations", Activations, body=body, repeatable=True)

    # the server

    def capabilities(self) -> Steps[Capabilities]:
        return self.caller.call("GET", "/v1/capabilities", Capabilities)

    def models(self) -> Steps[Models]:
        return self.caller.call("GET", "/v1/models", Models)

    def ready(self) -> Steps[Ready]:
        return self.caller.call("GET", "/readyz", Ready, retries=0)  # not being ready is the answer


def _waits(waiting: Waiting) -> dict[str, Any]:
    return {"wait": waiting[0], "wait_seconds": waiting[1]}


def answer(replies: Sequence[Classified]) -> Answer:
    """The reply to one text as its answer."""
    (reply,) = replies
    (result,) = reply.results
    fields = {name: getattr(result, name) for name in result.model_fields_set | (result.model_extra or {}).keys()}
    return Answer.model_construct(**fields, model=reply.model, erasure=reply.erasure, usage=reply.usage)


def answers(replies: Sequence[Classified]) -> Answers:
    """The replies to a list's parts as one."""
    return Answers(
        model=replies[0].model,
        results=tuple(result for reply in replies for result in reply.results),
        plans=tuple(reply.erasure for reply in replies),
        usage=Usage(tokens=sum(reply.usage.tokens for reply in replies)),
    )
