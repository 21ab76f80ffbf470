"""Fits through both clients: one real fit on a real server, and everything else about jobs on a scripted one."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from app.jobs.schemas import FitIn
from neuronlens_client import (
    AccessDenied,
    Client,
    Conflict,
    DeadlineExceeded,
    FitSettings,
    InvalidRequest,
    JobChanged,
    NotFound,
)
from neuronlens_client.replies import Job
from tests.client.conftest import Clock, Received, Scripted, refusal
from tests.client.test_client import unknown_fields
from tests.servers import RunningServer
from tests.workers.texts import labelled_texts, write_jsonl

ClientOf = Callable[..., Any]
JOB = {
    "id": "j-1",
    "kind": "fit",
    "model": "m",
    "state": "running",
    "progress": None,
    "request": {"data": "a.jsonl"},
    "by": "http",
    "created_at": 1.0,
    "started_at": 2.0,
    "ended_at": None,
    "attempts": 1,
    "error": None,
    "exit_code": None,
    "range_set": None,
    "generation": None,
}


@pytest.fixture(scope="module")
def fitting(start_shared: Callable[..., RunningServer], tmp_path_factory: pytest.TempPathFactory) -> RunningServer:
    """A server that fits on one small file."""
    directory = tmp_path_factory.mktemp("texts")
    rows = [(text, label) for text, label in labelled_texts(60, seed=3) if label != "SciTech"]
    write_jsonl(directory / "small.jsonl", rows)
    return start_shared(fit_dirs=[directory], fit_threads=1, fit_niceness=0, fit_device="cpu")


@pytest.fixture(scope="module")
def done(fitting: RunningServer) -> Job:
    """A fit that was requested and waited for."""
    with Client(fitting.url) as client:
        job = client.fit("small.jsonl", bins=16, rankings=["max"], activate=True, reason="a try")
        assert not list(unknown_fields(job))
        return client.wait(job.id, timeout=300)


def test_a_fit_is_done_and_both_clients_read_it(client_of: ClientOf, fitting: RunningServer, done: Job) -> None:
    client = client_of(fitting.url)
    assert (done.state, done.ended, done.error, done.request["reason"]) == ("done", True, None, "a try")
    assert not list(unknown_fields(done))
    assert client.wait(done.id) == client.job(done.id) == done
    assert client.jobs().jobs == (done,)
    assert client.erasures().generation == done.generation
    assert client.range_sets().active == done.range_set
    with closing(client.events()) as events:
        changed = next(event for event in events if isinstance(event, JobChanged) and event.job.ended)
    assert changed.job == done
    with pytest.raises(Conflict) as raised:
        client.cancel(done.id)
    assert raised.value.code == "job_over"


def test_a_job_is_waited_for_and_cancelled(client_of: ClientOf, scripted: Scripted, clock: Clock) -> None:
    scripted.answers = [(202, {}, JOB)]
    client = client_of(scripted.url)
    job = client.fit("a.jsonl", bins=16, idempotency_key="once")
    (request,) = scripted.received
    assert (request.method, request.path, request.headers["idempotency-key"]) == ("POST", "/v1/fits", "once")
    assert request.body == {"data": "a.jsonl", "bins": 16}
    with pytest.raises(DeadlineExceeded, match=job.id):
        client.wait(job.id, timeout=5)
    assert 0 < sum(clock.pauses) <= 5

    def cancelling(request: Received) -> Any:
        return 200, {}, JOB | {"state": "cancelling" if request.method == "DELETE" else "cancelled"}

    scripted.answers = [cancelling]
    assert client.cancel(job.id).state == "cancelling"
    assert (scripted.received[-1].method, scripted.received[-1].path) == ("DELETE", "/v1/jobs/j-1")
    assert client.wait(job.id).state == "cancelled"


def test_invalid_fits_are_rejected(client_of: ClientOf, fitting: RunningServer, server: RunningServer) -> None:
    client = client_of(fitting.url)
    with pytest.raises(InvalidRequest) as raised:
        client.fit("../etc/passwd")
    assert raised.value.code == "unusable_data"
    with pytest.raises(NotFound) as missing:
        client.job("nonsense")
    assert missing.value.code == "unknown_job"
    with pytest.raises(AccessDenied) as refused:
        client_of(server.url).fit("a.jsonl")
    assert refused.value.code == "fits_disabled"


def test_a_fit_with_a_lost_reply_is_repeated_with_the_same_key(
    client_of: ClientOf, scripted: Scripted, clock: Clock
) -> None:
    scripted.answers = ["cut", refusal(503, "store_unavailable", {"Retry-After": "0"}), refusal(422, "invalid")]
    client = client_of(scripted.url)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            client.fit("a.jsonl")
    keys = [each.headers["idempotency-key"] for each in scripted.received]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_typed_fit_settings_are_the_fields_that_the_server_accepts() -> None:
    assert set(FitSettings.__annotations__) == set(FitIn.model_fields) - {"data", "model"}
