"""Servers that take fits, and texts for them; every fit is a process of its own, on a tiny model."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.jobs import process
from tests.forking import ForkedFits, forker
from tests.servers import RunningServer
from tests.workers.texts import labelled_texts, write_jsonl

Start = Callable[..., dict[str, Any]]
SECONDS = 300.0
"""A busy machine gives little time to fits, which are nice."""


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with files of texts in `news`, both fitted in a moment."""
    directory = tmp_path_factory.mktemp("texts")
    (directory / "news").mkdir()
    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(MEDIUM_ROWS, seed=3)]
    for name, found in (("small", rows[:90]), ("medium", rows)):
        write_jsonl(directory / "news" / f"{name}.jsonl", found)
    return directory


SMALL = {"data": "news/small.jsonl", "bins": 16, "rankings": ["max"]}
MEDIUM_ROWS = 1200
"""More than one chunk."""
MEDIUM = SMALL | {"data": "news/medium.jsonl", "layers": "all", "batch_tokens": 1024}
HOLD_ROWS = 500
"""Rows after which a fit waits, while it is held."""
HOLDING = """
import time
from pathlib import Path
from app.jobs import child

report = child.ServerJob.__call__

def report_and_wait(self, what, done, total):
    report(self, what, done, total)
    while what == "fitting" and done >= {rows} and Path({hold!r}).exists():
        time.sleep(0.01)

child.ServerJob.__call__ = report_and_wait
child.MESSAGE_SECONDS = child.CHECKPOINT_SECONDS = 0.0
"""
"""Makes a fit wait while a file exists, and report its progress and write a checkpoint after every batch."""


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    """While this file exists, forked fits do not get beyond `HOLD_ROWS`."""
    return tmp_path / "hold"


@pytest.fixture(autouse=True)
def forked_fits(monkeypatch: pytest.MonkeyPatch, hold: Path) -> ForkedFits:
    """Servers of this process start fits as forks."""
    forks = ForkedFits(forker().address, HOLDING.format(rows=HOLD_ROWS, hold=str(hold)))
    monkeypatch.setattr(process, "subprocess", forks)
    return forks


@pytest.fixture
def fitting(start_server: Callable[..., RunningServer], texts: Path) -> RunningServer:
    """A server that takes fits of those texts."""
    return start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=3, fit_device="cpu")


def started(http: httpx.Client, request: dict[str, Any], **headers: str) -> dict[str, Any]:
    """Ask for a fit, and give its job."""
    reply = http.post(
        "/v1/fits", json=request, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def look(http: httpx.Client, job: str) -> dict[str, Any]:
    """A job as it is now."""
    reply = http.get(f"/v1/jobs/{job}")
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def when(http: httpx.Client, job: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job, as soon as the condition holds."""
    give_up = time.monotonic() + SECONDS
    while not condition(now := look(http, job)):
        assert time.monotonic() < give_up, now
        time.sleep(0.05)
    return now


def over(http: httpx.Client, job: str) -> dict[str, Any]:
    """The job, once it has ended."""
    return when(http, job, lambda now: now["state"] in ("done", "failed", "cancelled"))


def reading(http: httpx.Client, job: str, rows: int = 1) -> dict[str, Any]:
    """The running job, once it has fitted so many rows."""
    now = when(http, job, lambda now: now["progress"] is not None and now["progress"]["rows_done"] >= rows)
    assert now["state"] == "running", now
    return now


def job_directory(data_dir: Path, job: str) -> Path:
    """The directory of a job whose process was started."""
    (directory,) = data_dir.glob(f"jobs/*/{job}")
    return directory


def process_of(data_dir: Path, job: str) -> int:
    """The pid of the process of a job."""
    return int((job_directory(data_dir, job) / "lock").read_text())


def lives(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
