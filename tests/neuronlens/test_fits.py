"""Fits through both clients, on a real server, in real processes."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.fit_requests import FitIn
from neuronlens import Conflict, DeadlineExceeded, FitSettings, Invalid, JobChanged, NotFound, Refused
from tests.e2e.fits.conftest import LONG, SMALL, fitting, texts
from tests.neuronlens.conftest import Scripted, refusal
from tests.neuronlens.test_client import unknown
from tests.servers import RunningServer

__all__ = ["fitting", "texts"]
ClientOf = Callable[..., Any]


def test_a_fit_is_asked_for_and_waited_for(client_of: ClientOf, fitting: RunningServer) -> None:
    client = client_of(fitting.url)
    asked = client.fit(**SMALL, activate=True, reason="a try")
    assert not list(unknown(asked))
    done = client.wait(asked.id, timeout=300)
    assert (done.id, done.state, done.over, done.error) == (asked.id, "done", True, None)
    assert not list(unknown(done))
    assert done.request["reason"] == "a try"
    assert client.jobs().jobs == (done,)
    assert client.erasures().generation == done.generation
    assert client.range_sets().active == done.range_set
    with closing(client.events()) as events:
        told = next(event for event in events if isinstance(event, JobChanged) and event.job.over)
    assert told.job == done
    with pytest.raises(Conflict) as raised:
        client.cancel(done.id)
    assert raised.value.code == "job_over"


def test_a_fit_is_cancelled(client_of: ClientOf, fitting: RunningServer) -> None:
    client = client_of(fitting.url)
    job = client.fit(**LONG, idempotency_key="once")
    assert client.fit(**LONG, idempotency_key="once").id == job.id
    with pytest.raises(DeadlineExceeded, match=job.id):
        client.wait(job.id, timeout=0.2)
    assert client.cancel(job.id).state in ("cancelling", "cancelled")
    assert client.wait(job.id, timeout=300).state == "cancelled"
    assert len(client.jobs().jobs) == 1


def test_what_cannot_be_fitted_is_said(
    client_of: ClientOf, fitting: RunningServer, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    client = client_of(fitting.url)
    with pytest.raises(Invalid) as raised:
        client.fit("../etc/passwd")
    assert raised.value.code == "unusable_data"
    with pytest.raises(NotFound) as missing:
        client.job("nonsense")
    assert missing.value.code == "unknown_job"
    with pytest.raises(Refused) as refused:
        client_of(start_server().url).fit("a.jsonl")
    assert refused.value.code == "fits_disabled"


def test_a_fit_whose_answer_was_lost_is_not_begun_twice(client_of: ClientOf, scripted: Scripted) -> None:
    scripted.answers = ["cut", refusal(503, "jobs_unavailable", {"Retry-After": "0"}), refusal(422, "invalid")]
    client = client_of(scripted.url)
    for _ in range(2):
        with pytest.raises(Invalid):
            client.fit("a.jsonl")
    keys = [each.headers["idempotency-key"] for each in scripted.asked]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_what_a_fit_may_be_told_is_what_the_server_takes() -> None:
    assert set(FitSettings.__annotations__) == set(FitIn.model_fields) - {"data", "model"}
