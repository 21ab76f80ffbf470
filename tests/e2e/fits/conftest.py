"""Servers that take fits, and texts for them; every fit is a real process on a tiny model."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import RunningServer
from tests.workers.texts import labelled_texts, write_jsonl

Start = Callable[..., dict[str, Any]]
SECONDS = 300.0
"""Fits are the last that a busy machine gives time to."""


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `small.jsonl`, done in a moment, and `long.jsonl`, which lets one look at a fit under way."""
    directory = tmp_path_factory.mktemp("texts")
    (directory / "news").mkdir()
    for name, rows in (("small", 90), ("long", 20_000)):
        found = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(rows, seed=3)]
        write_jsonl(directory / "news" / f"{name}.jsonl", found)
    return directory


SMALL = {"data": "news/small.jsonl", "bins": 16, "rankings": ["max"]}
LONG = {"data": "news/long.jsonl", "bins": 16, "rankings": ["max"], "layers": "all", "batch_tokens": 256}
"""Small batches: they make it slow, whatever the machine."""
MEDIUM = LONG | {"max_rows": 2500}


@pytest.fixture
def fitting(start_server: Callable[..., RunningServer], texts: Path) -> RunningServer:
    """A server that reads those texts."""
    return start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=3, fit_device="cpu")


def started(http: httpx.Client, request: dict[str, Any], **headers: str) -> dict[str, Any]:
    """The job of a fit that the server took."""
    reply = http.post("/v1/fits", json=request, headers={name.replace("_", "-"): it for name, it in headers.items()})
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def look(http: httpx.Client, job: str) -> dict[str, Any]:
    reply = http.get(f"/v1/jobs/{job}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def when(http: httpx.Client, job: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job as soon as it is so."""
    give_up = time.monotonic() + SECONDS
    while not condition(now := look(http, job)):
        assert time.monotonic() < give_up, now
        time.sleep(0.05)
    return now


def over(http: httpx.Client, job: str) -> dict[str, Any]:
    """The job when nothing more happens to it."""
    return when(http, job, lambda now: now["state"] in ("done", "failed", "cancelled"))


def reading(http: httpx.Client, job: str, rows: int = 1) -> dict[str, Any]:
    """The job when it has fitted so many rows, and is not over."""
    now = when(http, job, lambda now: now["progress"] is not None and now["progress"]["rows_done"] >= rows)
    assert now["state"] == "running", now
    return now


def process_of(directory: Path, job: str) -> int:
    """The pid of the process of a job."""
    import json

    pid = json.loads((directory / "jobs" / job / "job.json").read_text())["pid"]
    assert isinstance(pid, int)
    return pid


def lives(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
