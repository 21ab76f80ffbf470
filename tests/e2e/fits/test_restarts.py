"""A fit outlives its server: drained, killed, or with another one beside it on the same data directory."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.e2e.faults.processes import Served
from tests.e2e.fits.conftest import LONG, SECONDS, lives, over, process_of, reading, started, when
from tests.processes import end_redis
from tests.range_store.waiting import until
from tests.servers import RunningServer
from workers.fitting.rows import BLOCK_ROWS
from workers.models.loading import LoadedModel

Serve = Callable[[], Served]


@pytest.fixture
def server(model: LoadedModel, texts: Path, tmp_path: Path) -> Iterator[Serve]:
    """`server()`: `neuronlens serve` with a private Redis, on the same data directory each time."""
    with ExitStack() as stack:

        def start() -> Served:
            fits = {
                "NEURONLENS_FIT_DIRS": f'["{texts}"]',
                "NEURONLENS_FIT_THREADS": "1",
                "NEURONLENS_FIT_NICENESS": "0",
            }
            served = Served(model.source, None, "--data-dir", tmp_path, **fits)
            stack.callback(served.close)
            return served

        yield start
    end_redis(tmp_path / "redis")


def test_a_server_that_is_killed_or_drained_goes_on_with_its_fit(server: Serve, tmp_path: Path) -> None:
    """It begins where the checkpoint left it, and ends in the range set of a fit that nothing disturbed; no process is
    left behind.
    """
    first = server()
    wanted = LONG | {"max_rows": 12_000}
    undisturbed = over(first.http, started(first.http, wanted)["id"])["range_set"]
    job = started(first.http, wanted | {"activate": True})["id"]
    reading(first.http, job, 2000)
    pids = [process_of(tmp_path, job)]
    until(lambda: any((tmp_path / "jobs" / job / "checkpoints").glob("fit-*")), SECONDS)
    first.close()
    until(lambda: not lives(pids[0]), SECONDS)
    kept = rows_in(tmp_path / "jobs" / job / "checkpoints")

    second = server()
    resumed = when(second.http, job, lambda now: now["attempts"] == 2 and fits(now))
    assert (resumed["state"], resumed["attempts"]) == ("running", 2)
    assert resumed["progress"]["rows_done"] >= kept > 0, "a fit begun anew would take as long as before to be here"
    pids.append(process_of(tmp_path, job))
    second.command.process.send_signal(signal.SIGTERM)
    assert second.command.end() == 0
    assert not lives(pids[1])

    third = server()
    done = over(third.http, job)
    assert (done["state"], done["range_set"], done["error"]) == ("done", undisturbed, None)
    assert done["attempts"] == 2, "an orderly end is no failed attempt"
    assert third.http.get("/v1/erasures").json()["range_set"] == undisturbed
    until(lambda: not (tmp_path / "jobs" / job / "checkpoints").exists())


def fits(job: dict[str, Any]) -> bool:
    """Whether a job says how many texts it has fitted; what it tells first is of its first batch."""
    return job["progress"] is not None and job["progress"]["phase"] == "fitting"


def rows_in(checkpoints: Path) -> int:
    """How many texts the checkpoint of a fit has: whole blocks, and those done of the one under way."""
    (path,) = checkpoints.glob("fit-*.safetensors")
    arrays = load_file(path)
    under_way = arrays["block.done"].sum() if "block.done" in arrays else 0
    return int(arrays["counters.next_block"].item() * BLOCK_ROWS + under_way)


def test_of_two_servers_one_runs_the_fit_and_the_other_takes_over(
    start_server: Callable[..., RunningServer], texts: Path, tmp_path: Path
) -> None:
    one = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0)
    until(lambda: one.service.fits.runs)
    two_models = start_server(fit_dirs=[texts], fit_threads=1, fit_niceness=0, name=one.service.name)
    job = started(two_models.http, LONG)["id"]
    assert started(one.http, LONG)["id"] == job
    reading(two_models.http, job)
    pid = process_of(tmp_path, job)
    assert not two_models.service.fits.runs

    def told() -> int:
        """Rows that the streams of the server which does not run it tell of; -1: it does not run."""
        (newest,) = (json.loads(data) for data in two_models.service.news.jobs_since(0)[1])
        assert newest["id"] == job
        return newest["progress"]["rows_done"] if newest["state"] == "running" and newest["progress"] else -1

    until(lambda: told() > 0, SECONDS)
    before = told()
    until(lambda: told() > before, SECONDS)
    one.service.fits.close()
    assert not lives(pid)
    until(lambda: two_models.service.fits.runs)
    assert reading(two_models.http, job)["attempts"] == 1
    assert lives(process_of(tmp_path, job))
    two_models.http.delete(f"/v1/jobs/{job}").raise_for_status()
    assert over(one.http, job)["state"] == "cancelled"
