"""`neuronlens fit` is killed again and again (DESIGN promise 6): a range set is there whole or not at all."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from range_store.keys import RANGE_SET
from range_store.store import RangeStore
from tests.e2e.faults.processes import Forks, RedisProcess, Served
from tests.range_store.waiting import until
from tests.servers import LABELS
from tests.workers.texts import labelled_texts, write_jsonl
from workers.models.loading import LoadedModel

KILLS = 20
WHILE_PUBLISHING = 6
"""Of these kills, so many as soon as the first part of the range set is in Redis, or more until one left a half."""


class Watching:
    """Looks at the store without a pause, directly and through a server; a range set that is listed must be whole."""

    def __init__(self, store: RangeStore, served: Served) -> None:
        self.store, self.server = store, served
        self.pause = threading.Lock()
        self.looks = 0
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def look(self) -> None:
        for found in self.store.list():
            whole = self.store.read(found.id)
            for layer in whole.layers:
                self.store.read_inspect(found.id, layer)
            assert found.provenance == whole.provenance
            self.seen.add(found.id)
        answer = self.server.http.get("/v1/range-sets")
        assert answer.status_code == 200, answer.text
        self.seen.update(each["id"] for each in answer.json()["range_sets"])
        self.looks += 1

    @contextmanager
    def always(self) -> Iterator[None]:
        stopping = threading.Event()

        def watch() -> None:
            while not stopping.wait(0.005):
                with self.pause:
                    try:
                        self.look()
                    except Exception as error:
                        self.wrong.append(repr(error))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()


def parts(client: redis.Redis, apart_from: str) -> list[bytes]:
    """Keys of range sets that are not `apart_from`."""
    keys = client.keys(f"{RANGE_SET}*")
    assert isinstance(keys, list)
    return [key for key in keys if apart_from.encode() not in key]


def test_a_fit_that_is_killed_leaves_nothing_half_and_ends_in_the_same_range_set(
    served: Served, store: RangeStore, redis_process: RedisProcess, model: LoadedModel, forks: Forks, tmp_path: Path
) -> None:
    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(4000, seed=3)]
    assert {label for _, label in rows} == set(LABELS)
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    checkpoints = tmp_path / "data" / "fits"
    before = str(store.live().range_set)
    place = ["--redis-url", redis_process.url, "--data-dir", str(tmp_path / "data"), "--name", served.name]
    what = ["--model", model.source, "--data", str(data), "--layer", "all", "--threads", "1", "--device", "cpu"]
    command = ["fit", *what, *place]
    said = tmp_path / "said"
    watching, rng = Watching(store, served), random.Random(5)
    client = redis_process.client()

    def listed() -> set[str]:
        return {found.id for found in store.list()} - {before}

    def take_out() -> None:
        """So that the next fit has something to publish."""
        with watching.pause:
            for id_ in listed():
                store.remove(id_)
            if leftover := parts(client, before):
                client.delete(*leftover)

    try:
        began = time.monotonic()
        forks.start(command, said)
        assert forks.end() == 0
        took = time.monotonic() - began
        (undisturbed,) = listed()
        take_out()
        killed = resumed = halves = 0
        with watching.always():
            while killed < KILLS or not halves:
                resumed += any(checkpoints.iterdir())
                pid = forks.start(command, said)
                if killed < WHILE_PUBLISHING or not halves:
                    until(lambda: parts(client, before), 120)
                    time.sleep(rng.choice([0, 0, 0.002, 0.01]))
                else:
                    time.sleep(rng.uniform(0, took))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                code = forks.end()
                assert code in (0, -signal.SIGKILL)
                killed += code != 0
                halves += not listed() and bool(parts(client, before))
                assert listed() <= {undisturbed}
                if listed():
                    take_out()
            forks.start(command, said)
            assert forks.end() == 0
            assert listed() == {undisturbed}
            with watching.pause:
                watching.look()
        assert watching.wrong == []
        assert watching.seen == {before, undisturbed}
        assert watching.looks > KILLS
        assert resumed > KILLS / 4, "kills came while there was something to go on from"
        assert "Traceback" not in said.read_text()
        assert not list(checkpoints.iterdir()), "nothing is kept of what is published, nor of what was half written"
    finally:
        client.close()
        take_out()
