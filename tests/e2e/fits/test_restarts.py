"""A fit outlives its server and Redis: one of them dies, is drained or emptied, or another server takes over."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from app.jobs import runner
from app.jobs.schemas import FitIn
from tests.e2e.faults.processes import RedisProcess, Served
from tests.e2e.fits.conftest import (
    HOLD_ROWS,
    HOLDING,
    MEDIUM,
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
from tests.forking import forker
from tests.processes import end_redis
from tests.range_store.waiting import until
from tests.servers import RunningServer
from workers.corpora.rows import CHUNK_ROWS
from workers.models.loading import LoadedModel

FORK_FITS = """
from app.jobs import process
from tests.forking import ForkedFits

process.subprocess = ForkedFits({address!r}, {code!r})
"""


@pytest.fixture
def serve(model: LoadedModel, texts: Path, hold: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """`serve()`: `neuronlens serve` with a private Redis, on the same data directory each time."""
    fits = {"NEURONLENS_FIT_DIRS": f'["{texts}"]', "NEURONLENS_FIT_THREADS": "1", "NEURONLENS_FIT_NICENESS": "0"}
    code = FORK_FITS.format(address=forker().address, code=HOLDING.format(rows=HOLD_ROWS, hold=str(hold)))
    with ExitStack() as stack:

        def start() -> Served:
            server = Served(model.source, None, "--data-dir", tmp_path, code=code, **fits)
            stack.callback(server.close)
            return server

        yield start
    end_redis(tmp_path / "redis")


def test_fit_of_a_killed_or_drained_server_goes_on_with_the_next(
    serve: Callable[[], Served], hold: Path, tmp_path: Path
) -> None:
    """It resumes from its checkpoint, publishes the range set of an undisturbed fit, and no process is left behind."""
    first = serve()
    undisturbed = over(first.http, started(first.http, MEDIUM)["id"])["range_set"]
    hold.touch()
    job = started(first.http, MEDIUM | {"activate": True})["id"]
    reading(first.http, job, HOLD_ROWS)
    pids = [process_of(tmp_path, job)]
    first.close()
    until(lambda: not lives(pids[0]), SECONDS)
    kept = rows_in(job_directory(tmp_path, job) / "checkpoints")

    second = serve()
    resumed = when(second.http, job, lambda now: now["attempts"] == 2 and now["progress"] is not None)
    resumed = when(second.http, job, lambda now: now["progress"]["phase"] == "fitting")
    assert (resumed["state"], resumed["attempts"]) == ("running", 2)
    assert resumed["progress"]["rows_done"] >= kept >= HOLD_ROWS, "rows of the checkpoint are not fitted again"
    pids.append(process_of(tmp_path, job))
    second.command.process.send_signal(signal.SIGTERM)
    assert second.command.end() == 0
    assert not lives(pids[1])

    hold.unlink()
    third = serve()
    done = over(third.http, job)
    assert (done["state"], done["range_set"], done["error"]) == ("done", undisturbed, None)
    assert done["attempts"] == 2, "an orderly end is no failed attempt"
    assert third.http.get("/v1/erasures").json()["range_set"] == undisturbed
    until(lambda: not (job_directory(tmp_path, job) / "checkpoints").exists())


def rows_in(checkpoints: Path) -> int:
    """How many texts the checkpoint of a fit has: whole chunks, and those of the chunk that was begun."""
    (path,) = checkpoints.glob("fit-*.safetensors")
    arrays = load_file(path)
    begun = arrays["chunk.done"].sum() if "chunk.done" in arrays else 0
    return int(arrays["counters.next_chunk"].item() * CHUNK_ROWS + begun)


def test_second_server_takes_over_the_fit_of_the_first(
    start_server: Callable[..., RunningServer],
    texts: Path,
    hold: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two servers on one data directory, one runs the fit, and both tell how far it is."""
    monkeypatch.setattr(runner, "TICK", 0.2)
    hold.touch()
    first = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0)
    until(lambda: first.service.fits.holds_lease)
    second = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0, name=first.service.name)
    job = started(second.http, MEDIUM)["id"]
    assert started(first.http, MEDIUM)["id"] == job
    reading(second.http, job, HOLD_ROWS)
    pid = process_of(tmp_path, job)
    assert not second.service.fits.holds_lease

    def streamed_rows() -> int:
        """Rows that the event streams of the second server tell of."""
        (newest,) = map(json.loads, second.service.feed.jobs.values())
        assert newest["id"] == job
        return newest["progress"]["rows_done"] if newest["progress"] else 0

    until(lambda: streamed_rows() >= HOLD_ROWS, SECONDS)
    first.service.fits.close()
    assert not lives(pid)
    until(lambda: second.service.fits.holds_lease)
    assert reading(second.http, job)["attempts"] == 1
    assert lives(process_of(tmp_path, job))
    second.http.delete(f"/v1/jobs/{job}").raise_for_status()
    assert over(first.http, job)["state"] == "cancelled"


def test_fit_survives_an_emptied_and_a_killed_redis(
    start_server: Callable[..., RunningServer], texts: Path, hold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process goes on without Redis, and the attempt that could not publish is repeated."""
    monkeypatch.setattr(runner, "PAUSE", 0.1)
    redis_process = RedisProcess(tmp_path / "redis")
    try:
        running = start_server(redis_url=redis_process.url, fit_dirs=[texts], fit_threads=1, fit_niceness=0)
        hold.touch()
        job = started(running.http, MEDIUM)["id"]
        reading(running.http, job, HOLD_ROWS)
        with redis_process.client() as client:
            client.flushall()
        until(lambda: running.http.get(f"/v1/jobs/{job}").status_code == 200)
        pid = process_of(tmp_path, job)
        redis_process.kill()
        reply = running.http.get("/v1/jobs")
        assert (reply.status_code, reply.json()["code"]) == (503, "store_unavailable")
        assert lives(pid)
        hold.unlink()
        until(lambda: not lives(pid), SECONDS)
        redis_process.start()
        until(lambda: running.http.get(f"/v1/jobs/{job}").status_code == 200)
        done = over(running.http, job)
        assert (done["state"], done["attempts"], done["error"]) == ("done", 2, None)
        (published,) = running.http.get("/v1/range-sets").json()["range_sets"]
        assert published["id"] == done["range_set"]
    finally:
        running.service.fits.close()
        redis_process.kill()


def test_jobs_that_the_version_before_kept_in_files_are_taken_over(
    start_server: Callable[..., RunningServer], texts: Path, tmp_path: Path
) -> None:
    """Those that had not ended are run, and the others are listed; see `jobs/*/job.json` of commit 7daa738."""
    before = start_server(fit_dirs=[texts], name="files")
    fingerprint, request = (
        before.service.model.identity.fingerprint,
        FitIn.model_validate(SMALL).model_dump(mode="json"),
    )
    before.service.fits.close()
    del request["model"]
    kept = {"model": "files", "fingerprint": fingerprint, "request": request, "by": "key:ops", "key": None}
    kept |= {"started_at": None, "ended_at": None, "attempts": 1, "pid": 4_000_000, "error": None, "exit_code": None}
    kept |= {"range_set": None, "generation": None}
    states = {"a" * 16: "running", "b" * 16: "done", "c" * 16: "queued", "d" * 16: "queued"}
    for number, (id_, state) in enumerate(states.items()):
        directory = tmp_path / "jobs" / id_
        directory.mkdir(parents=True)
        fields = kept | {"id": id_, "state": state, "created_at": 1000.0 + number}
        fields |= {"model": "another"} if id_[0] == "d" else {}
        (directory / "job.json").write_text(json.dumps(fields))
    (tmp_path / "jobs" / ("c" * 16) / "cancel").touch()
    (tmp_path / "jobs" / ("e" * 16)).mkdir()
    (tmp_path / "jobs" / ("e" * 16) / "job.json").write_text("{")

    running = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0, fit_device="cpu", name="files")
    until(lambda: len(running.http.get("/v1/jobs").json()["jobs"]) == 3)
    done = over(running.http, "a" * 16)
    assert (done["state"], done["attempts"], done["by"], done["created_at"]) == ("done", 2, "key:ops", 1000.0)
    assert [over(running.http, letter * 16)["state"] for letter in "bc"] == ["done", "cancelled"]
    assert [path.parent.name[0] for path in (tmp_path / "jobs").glob("*/job.json")] == ["d", "e"]
