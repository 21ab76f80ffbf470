"""The commands of docs/operations.md for backup and restore, on the Redis of the operating system."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.embedded.connection import connect
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.processes import answers
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until

pytestmark = pytest.mark.system

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
FINGERPRINT = random_range_set(1)[0].provenance.model.fingerprint

Start = Callable[[Path], redis.Redis]


def commands(name: str) -> str:
    """The shell block that follows the comment `<!-- name -->` on the page."""
    found = re.search(rf"<!-- {name} -->\n```\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(directory)`: start a Redis with the persistence of the committed configuration; gives a client."""
    running: list[subprocess.Popen[bytes]] = []
    clients: list[redis.Redis] = []

    def begin(directory: Path) -> redis.Redis:
        socket = directory / "r.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", str(directory)]
        options += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        running.append(subprocess.Popen(["/usr/bin/redis-server", *options], stdout=subprocess.DEVNULL))
        clients.append(connect(f"unix://{socket}", directory))
        until(lambda: socket.exists() and answers(clients[-1]))
        return clients[-1]

    yield begin
    for client in clients:
        client.close()
    for process in running:
        process.terminate()
        process.wait()


def shell(script: str, directory: Path) -> None:
    subprocess.run(["bash", "-euc", script], cwd=directory, check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_a_backup_is_restored_and_a_server_puts_a_later_state_back(start: Start, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    client = start(old)
    store, keys = RangeStore(client, "news"), ApiKeyStore(client)
    id_ = store.range_sets.publish(*random_range_set(1))
    store.activate(id_)
    concept = store.range_sets.provenance(id_).concepts[0]
    kept = store.set_erasure(LiveErasure(erasure=Erasure(concept=concept), reason="kept"))
    _, token = keys.create("app", ["infer"])

    shell(commands("backup").replace("redis-cli", f"redis-cli -s {old}/r.sock"), tmp_path)
    later = store.remove_erasure(concept)
    mirror = Mirror(store, FINGERPRINT)
    assert mirror.refresh().live == later

    (tmp_path / "backup.rdb").rename(new / "backup.rdb")
    shell(commands("restore"), new)
    restored = start(new)
    again = RangeStore(restored, "news")
    assert again.live_state() == kept
    assert again.range_sets.read(id_).provenance == store.range_sets.read(id_).provenance
    assert [entry.action for entry in again.audit()] == ["set", "activate", "create"]
    known = ApiKeyStore(restored).read()
    assert known is not None
    assert known.find_by_token(token) is not None

    mirror._store = mirror._recovery._store = again  # a server that knows the later state finds the older one
    state = mirror.refresh().live
    assert (state.erasures, state.is_at_least(later.generation)) == ((), True)
    assert again.audit(1)[0].action == "restore"
