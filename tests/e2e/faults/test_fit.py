"""`neuronlens fit` is killed: a range set is there whole or not at all, and the next run goes on from a checkpoint."""

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import redis

from range_store.storage.schema import RANGE_SET
from range_store.storage.store import RangeStore
from tests.e2e.faults.processes import RedisProcess, Served
from tests.processes import Running
from tests.servers import LABELS
from tests.workers.texts import labelled_texts, write_jsonl
from workers.models.loading import LoadedModel

FREQUENT_CHECKPOINTS = "import app.serving.fit; app.serving.fit.CHECKPOINT_SECONDS = {seconds}\n"
DIE_WHILE_FITTING = """
import os, signal
from app.serving import fit as module

fit = module.fit

def fit_and_die(*arguments, progress, **choices):
    def die(now):
        if now.done >= {rows}:
            os.kill(os.getpid(), signal.SIGKILL)
    return fit(*arguments, progress=die, **choices)

module.fit = fit_and_die
"""
DIE_WHILE_PUBLISHING = """
import os, signal
from range_store.storage import range_sets

encode = range_sets.encode_parts

def encode_and_die(*arguments):
    left = {parts}
    for part in encode(*arguments):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield part
        left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

range_sets.encode_parts = encode_and_die
"""


@dataclass
class FitCommand:
    """`neuronlens fit` for the model of the server process, again and again."""

    arguments: list[object]
    checkpoints: Path
    store: RangeStore
    client: redis.Redis
    active: str
    """The range set that was there before."""

    def start(self, code: str = "", checkpoint_seconds: float = 0.0) -> Running:
        return Running(self.arguments, code=FREQUENT_CHECKPOINTS.format(seconds=checkpoint_seconds) + code)

    def run(self, code: str = "") -> int:
        """Run it until it ends; gives its exit code."""
        running = self.start(code)
        exit_code = running.end()
        assert "Traceback" not in "".join(running.stderr)
        return exit_code

    def published(self) -> set[str]:
        """Ids of the range sets that fits published."""
        return {found.id for found in self.store.range_sets.list()} - {self.active}

    def stored_parts(self) -> list[bytes]:
        """Keys of range sets that fits wrote, published or not."""
        keys = cast("list[bytes]", self.client.keys(f"{RANGE_SET}*"))
        return [key for key in keys if self.active.encode() not in key]

    def remove_published(self) -> None:
        """Remove what fits wrote, so that the next one publishes again."""
        for id_ in self.published():
            self.store.range_sets.remove(id_)
        if leftover := self.stored_parts():
            self.client.delete(*leftover)

    def has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("fit-*.safetensors"))


@pytest.fixture
def fit_command(
    served: Served, store: RangeStore, redis_process: RedisProcess, model: LoadedModel, tmp_path: Path
) -> Iterator[FitCommand]:
    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(1500, seed=3)]
    assert {label for _, label in rows} == set(LABELS)
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    place = ["--redis-url", redis_process.url, "--data-dir", tmp_path / "data", "--name", served.name]
    what = ["--model", model.source, "--data", data, "--layer", "all", "--threads", "1", "--device", "cpu"]
    with redis_process.client() as client:
        active = str(store.live_state().range_set)
        fit = FitCommand(["fit", *what, *place], tmp_path / "data" / "fits", store, client, active)
        yield fit
        fit.remove_published()


def read_everything(store: RangeStore, served: Served) -> set[str]:
    """Ids of all range sets that are listed; each must be whole, for other processes and over HTTP."""
    seen = set()
    for found in store.range_sets.list():
        whole = store.range_sets.read(found.id)
        for layer in whole.layers:
            store.range_sets.read_inspect(found.id, layer)
        assert found.provenance == whole.provenance
        seen.add(found.id)
    answer = served.http.get("/v1/range-sets")
    assert answer.status_code == 200, answer.text
    return seen | {each["id"] for each in answer.json()["range_sets"]}


def test_killed_fit_publishes_nothing_and_resumes_to_the_same_range_set(
    fit_command: FitCommand, served: Served, store: RangeStore
) -> None:
    """It is killed while it reads texts, and while it writes the parts of the range set."""
    assert fit_command.run() == 0
    (undisturbed,) = fit_command.published()
    fit_command.remove_published()
    assert not list(fit_command.checkpoints.iterdir()), "the checkpoint of a published fit is discarded"
    for code, parts in ((DIE_WHILE_FITTING.format(rows=1100), 0), (DIE_WHILE_PUBLISHING.format(parts=1), 1)):
        assert fit_command.run(code) == -signal.SIGKILL
        assert fit_command.has_checkpoint()
        assert len(fit_command.stored_parts()) == parts
        assert read_everything(store, served) == {fit_command.active}
    resumes = DIE_WHILE_FITTING.format(rows=0).replace("now.done >= 0", "not now.resumed")
    assert fit_command.run(resumes) == 0, "a fit that starts anew is killed"
    assert fit_command.published() == {undisturbed}
    assert read_everything(store, served) == {fit_command.active, undisturbed}
    assert not list(fit_command.checkpoints.iterdir())


@contextmanager
def reading_all_the_time(store: RangeStore, served: Served, pause: threading.Lock) -> Iterator[set[str]]:
    """Read everything again and again in a thread, except while `pause` is held; gives the ids seen so far."""
    seen: set[str] = set()
    errors: list[str] = []
    stopping = threading.Event()

    def read() -> None:
        while not stopping.wait(0.005):
            with pause:
                try:
                    seen.update(read_everything(store, served))
                except Exception as error:
                    errors.append(repr(error))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        stopping.set()
        thread.join()
    assert errors == []


@pytest.mark.full
def test_fits_killed_at_any_moment_never_show_a_partial_range_set(
    fit_command: FitCommand, served: Served, store: RangeStore, pytestconfig: pytest.Config
) -> None:
    """After each part of the range set, and at random times; somebody reads the store all the time."""
    rng = random.Random(pytestconfig.getoption("--seed"))
    began = time.monotonic()
    assert fit_command.run() == 0
    took = time.monotonic() - began
    (undisturbed,) = fit_command.published()
    parts = 2 * len(store.range_sets.read(undisturbed).layers)  # the metadata follow them
    fit_command.remove_published()
    pause = threading.Lock()
    with reading_all_the_time(store, served, pause) as seen:
        for number in range(parts + 1):
            assert fit_command.run(DIE_WHILE_PUBLISHING.format(parts=number)) == -signal.SIGKILL
            assert fit_command.published() == set()
            assert len(fit_command.stored_parts()) == number
        for _ in range(14):
            fit = fit_command.start(checkpoint_seconds=0.1)
            time.sleep(rng.uniform(0, took))
            fit.kill()
            with pause:
                assert fit_command.published() <= {undisturbed}
                fit_command.remove_published()
        assert fit_command.run() == 0
        assert fit_command.published() == {undisturbed}
    assert seen <= {fit_command.active, undisturbed}
    assert not list(fit_command.checkpoints.iterdir())
