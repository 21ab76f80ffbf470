"""Fits over HTTP: `POST /v1/fits` and `/v1/jobs`, with real processes."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.jobs import process, runner
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.api_keys import ApiKeyStore
from tests.e2e.fits.conftest import (
    HOLD_ROWS,
    MEDIUM,
    MEDIUM_ROWS,
    SECONDS,
    SMALL,
    job_directory,
    lives,
    over,
    process_of,
    reading,
    started,
    when,
)
from tests.processes import Running as Command
from tests.range_store.waiting import until
from tests.servers import RunningServer
from workers.models.loading import LoadedModel

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]


def test_fit_is_published_activated_and_used(fitting: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "subprocess", subprocess)  # here the process is started as it is in production
    job = started(fitting.http, SMALL | {"activate": True, "reason": "the first"})
    assert (job["state"], job["kind"], job["by"], job["model"]) == ("queued", "fit", "http", fitting.service.name)
    assert (job["request"]["layers"], job["request"]["activate"]) == ([-1], True)
    done = over(fitting.http, job["id"])
    assert (done["state"], done["error"], done["exit_code"], done["progress"]) == ("done", None, 0, None)
    assert done["created_at"] <= done["started_at"] <= done["ended_at"]
    live = fitting.http.get("/v1/erasures").json()
    assert (live["range_set"], live["generation"]) == (done["range_set"], done["generation"])
    (entry,) = [each for each in fitting.http.get("/v1/audit").json()["entries"] if each["action"] == "activate"]
    assert (entry["by"], entry["reason"]) == ("http", "the first")
    answer = fitting.classify("the keeper saved a penalty", erase=["Sports"]).json()
    assert answer["erasure"]["range_set"] == done["range_set"]
    assert fitting.http.get("/v1/jobs").json() == {"model": fitting.service.name, "jobs": [done]}


def test_fit_publishes_the_same_range_set_as_the_command(
    fitting: RunningServer, model: LoadedModel, texts: Path, tmp_path: Path
) -> None:
    """The id of a range set is a hash of its contents."""
    names = {"Business": "Money"}
    request = SMALL | {
        "layers": [-1, 0],
        "rankings": ["max", "probe", "selectivity"],
        "site": "mlp_output",
        "position": "mean",
        "probe_l1": 0.01,
        "probe_rows": 64,
        "batch_tokens": 512,
        "max_rows": 80,
        "rows_per_class": 15,
        "seed": 7,
        "label_map": names,
    }
    job = started(fitting.http, request)
    (tmp_path / "names.json").write_text(json.dumps(names))
    command = ["fit", "--model", model.source, "--data", texts / "news" / "small.jsonl", "--layer=-1,0"]
    command += ["--ranking", "max,probe,selectivity", "--site", "mlp_output", "--position", "mean"]
    command += ["--probe-l1", "0.01", "--probe-rows", "64", "--batch-tokens", "512", "--bins", "16"]
    command += ["--max-rows", "80", "--rows-per-class", "15", "--seed", "7", "--label-map", tmp_path / "names.json"]
    command += ["--threads", "1", "--device", "cpu", "--data-dir", tmp_path / "elsewhere", "--json"]
    command += ["--name", fitting.service.name]
    ended = Command(command)
    assert ended.end() == 0, ended.stderr
    printed = json.loads("".join(ended.stdout))
    assert over(fitting.http, job["id"])["range_set"] == printed["id"]
    assert printed["counts"]["Money"] == 15


def test_cancelled_fit_publishes_nothing_and_leaves_no_checkpoint(
    fitting: RunningServer, hold: Path, tmp_path: Path
) -> None:
    hold.touch()
    job = started(fitting.http, MEDIUM)["id"]
    waiting = started(fitting.http, SMALL)["id"]
    now = reading(fitting.http, job, HOLD_ROWS)
    assert now["progress"]["phase"] == "fitting"
    assert now["progress"]["rows_done"] < now["progress"]["rows_total"] == MEDIUM_ROWS
    assert now["progress"]["rows_per_second"] > 0
    assert now["progress"]["seconds_left"] > 0
    assert [fitting.value("neuronlens_fit_jobs", {"state": state}) for state in ("running", "queued")] == [1, 1]
    assert fitting.value("neuronlens_fit_progress_ratio") != 0
    pid = process_of(tmp_path, job)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    fitting.http.delete(f"/v1/jobs/{waiting}").raise_for_status()  # first, since it begins as soon as the other ends
    asked = fitting.http.delete(f"/v1/jobs/{job}")
    assert (asked.status_code, asked.json()["state"]) == (200, "cancelling")
    ended = over(fitting.http, job)
    assert (ended["state"], ended["range_set"], ended["error"]) == ("cancelled", None, None)
    assert not lives(pid)
    assert over(fitting.http, waiting)["started_at"] is None
    again = fitting.http.delete(f"/v1/jobs/{job}")
    assert (again.status_code, again.json()) == (200, ended), "a cancellation may be sent again"
    assert fitting.http.get("/v1/range-sets").json()["range_sets"] == []
    until(lambda: [path.name for path in job_directory(tmp_path, job).iterdir()] == ["log"])


def test_killed_fit_is_started_again(
    fitting: RunningServer, hold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PAUSE", 0.0)
    hold.touch()
    job = started(fitting.http, MEDIUM)["id"]
    reading(fitting.http, job, HOLD_ROWS)
    os.kill(process_of(tmp_path, job), signal.SIGKILL)
    again = when(fitting.http, job, lambda now: now["error"] is not None)
    assert "killed by signal 9" in again["error"]
    hold.unlink()
    done = over(fitting.http, job)
    assert (done["state"], done["attempts"], done["error"]) == ("done", 2, None)


def test_repeated_request_gives_the_same_job(fitting: RunningServer, problem: Problem, hold: Path) -> None:
    hold.touch()
    first = started(fitting.http, MEDIUM)["id"]
    assert started(fitting.http, MEDIUM)["id"] == first
    named = started(fitting.http, SMALL, Idempotency_Key="a")["id"]
    assert started(fitting.http, SMALL, Idempotency_Key="a")["id"] == named != first
    assert started(fitting.http, SMALL, Idempotency_Key="b")["id"] not in (first, named)
    other = fitting.http.post("/v1/fits", json=MEDIUM, headers={"Idempotency-Key": "a"})
    problem(other, 409, "idempotency_key_reused")
    fitting.http.delete(f"/v1/jobs/{named}").raise_for_status()
    assert over(fitting.http, named)["state"] == "cancelled"
    assert started(fitting.http, SMALL, Idempotency_Key="a")["id"] == named, "also after it was cancelled"
    third = started(fitting.http, MEDIUM | {"seed": 1})["id"]
    assert len({first, named, third}) == 3


def test_full_fit_queue_rejects_requests(
    start_server: Callable[..., RunningServer], texts: Path, problem: Problem, hold: Path
) -> None:
    hold.touch()
    running = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0, fit_queue=1)
    jobs = [started(running.http, MEDIUM | {"seed": seed})["id"] for seed in (1, 2)]
    full = running.http.post("/v1/fits", json=MEDIUM | {"seed": 3})
    problem(full, 429, "fit_queue_full")
    assert int(full.headers["retry-after"]) > 0
    running.http.delete(f"/v1/jobs/{jobs[1]}").raise_for_status()
    over(running.http, jobs[1])
    third = started(running.http, MEDIUM | {"seed": 3})["id"]
    for job in (jobs[0], third):
        running.http.delete(f"/v1/jobs/{job}").raise_for_status()
        assert over(running.http, job)["state"] == "cancelled"


def test_unusable_texts_give_the_error_line_of_the_command(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    """The file has the name that the request used; the next job in the queue is run."""
    texts = tmp_path / "texts"
    texts.mkdir()
    files = {
        "latin.jsonl": (b'{"text": "caf\xe9 closed", "label": "World"}\n' * 3, "latin.jsonl"),
        "other.jsonl": (b'{"body": "a", "label": "World"}\n', "has no column 'text'"),
        "stars[1-3].csv": (
            b"text,label\nso so,2\nbad,1\n",
            "1, which means 'Sports' if classes are counted",
        ),
    }
    running = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0, fit_device="cpu")
    jobs = {}
    for name, (content, _) in files.items():
        (texts / name).write_bytes(content)
        jobs[name] = started(running.http, {"data": name})["id"]
    for name, (_, words) in files.items():
        job = over(running.http, jobs[name])
        assert (job["state"], job["exit_code"], job["attempts"], job["range_set"]) == ("failed", 2, 1, None)
        assert words in job["error"]
        assert "\n" not in job["error"]
        assert str(tmp_path) not in job["error"]
        assert "caf" not in job["error"]
    command = ["fit", "--model", running.service.model.source, "--data", texts / "latin.jsonl"]
    ended = Command([*command, "--data-dir", tmp_path / "own", "--threads", "1", "--device", "cpu"])
    assert ended.end() == 2
    line = ended.stderr[-1].strip().replace(f"{texts}/", "")
    assert line == f"error: {over(running.http, jobs['latin.jsonl'])['error']}"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file beside the directory `in`, which fits may read, and which has links to it."""
    path = tmp_path_factory.mktemp("hostile")
    inside, outside = path / "in", path / "secret.jsonl"
    (inside / "news").mkdir(parents=True)
    outside.write_text('{"text": "secret", "label": "World"}\n')
    for name in ("news/small.jsonl", "news/notes.txt"):
        (inside / name).write_text(outside.read_text())
    os.mkfifo(inside / "pipe.jsonl")
    (inside / "link.jsonl").symlink_to(outside)
    (inside / "linked").symlink_to(path)
    return outside


@pytest.fixture(scope="module")
def idle(start_module_server: Callable[..., RunningServer], outside: Path) -> RunningServer:
    """A server of which no test of this module starts a fit."""
    return start_module_server(data_dir=outside.parent / "data", fit_dirs=[outside.parent / "in"])


@pytest.mark.parametrize(
    "data",
    [
        *(
            "../secret.jsonl",
            "news/../../secret.jsonl",
            "/etc/passwd",
            "{outside}",
            "link.jsonl",
            "linked/secret.jsonl",
        ),
        *("news", "news/", ".", "", "news/none.jsonl", "news/notes.txt", "pipe.jsonl", "*.jsonl", "x\0.jsonl"),
        *("file://{outside}", "imdb", "--help", "~/secret.jsonl", "news/small.jsonl/..", "a" * 5000),
    ],
)
def test_path_outside_the_fit_directories_is_rejected(idle: RunningServer, outside: Path, data: str) -> None:
    reply = idle.http.post("/v1/fits", json={"data": data.replace("{outside}", str(outside))})
    assert reply.status_code == 422, reply.text
    assert reply.json()["code"] in ("unusable_data", "invalid")
    assert str(outside.parent) not in reply.text
    assert idle.http.get("/v1/jobs").json()["jobs"] == []


def test_invalid_requests_are_rejected_at_once(idle: RunningServer, problem: Problem) -> None:
    invalid: tuple[dict[str, Any], ...] = (
        {"data": None},
        {"layers": []},
        {"rankings": ["none"]},
        {"rankings": ["max", "max"]},
        {"bins": 0},
        {"seed": -1},
        {"max_rows": 0},
        {"text_field": "a\nb"},
        {"unknown": 1},
        {"batch_tokens": 10**9},
        {"layers": -1},
    )
    for wrong in invalid:
        problem(idle.http.post("/v1/fits", json=SMALL | wrong), 422, "invalid")
    problem(idle.http.post("/v1/fits", json=SMALL | {"layers": [99]}), 422, "invalid_erasure")
    problem(idle.http.post("/v1/fits", json=SMALL | {"dataset": "none"}), 422, "unusable_data")
    problem(idle.http.post("/v1/fits", json={"dataset": "ag_news"}), 403, "fits_disabled")
    problem(idle.http.post("/v1/fits", json=SMALL | {"model": "other"}), 404, "unknown_model")
    for id_ in ("0123456789abcdef", "..", "%2E%2E", "a" * 300):
        for method in ("GET", "DELETE"):
            reply = idle.http.request(method, f"/v1/jobs/{id_}")
            assert reply.status_code in (404, 405), reply.text
    problem(idle.http.get("/v1/jobs/0123456789abcdef"), 404, "unknown_job")
    assert idle.http.get("/v1/jobs").json()["jobs"] == []


def test_server_without_fit_directories_refuses_fits(server: RunningServer, problem: Problem) -> None:
    refused = problem(server.http.post("/v1/fits", json=SMALL), 403, "fits_disabled")
    assert "NEURONLENS_FIT_DIRS" in refused["detail"]
    assert server.http.get("/v1/jobs").json()["jobs"] == []


def test_fits_need_scopes_and_the_audit_names_the_key(
    own_redis: EmbeddedRedis, start_server: Callable[..., RunningServer], texts: Path, problem: Problem
) -> None:
    keys = ApiKeyStore(own_redis)
    tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
    running = start_server(redis_url=own_redis.url, fit_dirs=[texts], fit_threads=1, fit_niceness=0)

    def call(method: str, path: str, scope: str, **more: Any) -> httpx.Response:
        return running.http.request(method, path, headers={"X-API-Key": tokens[scope]}, **more)

    for scope in ("infer", "read"):
        problem(call("POST", "/v1/fits", scope, json=SMALL), 403, "wrong_scope")
        problem(call("DELETE", "/v1/jobs/0123456789abcdef", scope), 403, "wrong_scope")
    problem(call("GET", "/v1/jobs", "infer"), 403, "wrong_scope")
    problem(running.http.get("/v1/jobs"), 401, "no_key")
    job = call("POST", "/v1/fits", "admin", json=SMALL | {"activate": True}).json()["id"]
    until(lambda: call("GET", f"/v1/jobs/{job}", "read").json()["state"] in ("done", "failed"), SECONDS)
    entries = call("GET", "/v1/audit", "admin").json()["entries"]
    assert entries[0]["by"] == "key:the-admin"
    store = running.service.store
    assert b"nl_" not in store.client.get(store.keys.jobs)
