"""The committed Redis users on a Redis 7 of the system: each can do its work, and nothing else."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.embedded.connection import connect
from range_store.errors import StoreUnavailable
from range_store.storage.archive import read_archive
from range_store.storage.jobs import JobStore
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import ReplicaRegistry, new_replica_name
from range_store.storage.store import RangeStore
from tests.docker.conftest import DOCKER, PASSWORDS, Store
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until

pytestmark = pytest.mark.system

Client = Callable[[str], redis.Redis]


@pytest.fixture
def client(store_server: Store, tmp_path: Path) -> Iterator[Client]:
    """`client("operator")`: a client with that user's password."""
    opened: list[redis.Redis] = []

    def open_(user: str) -> redis.Redis:
        opened.append(connect(store_server.url(user), tmp_path))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


def test_operator_can_do_everything_with_the_store(client: Client, tmp_path: Path) -> None:
    store = RangeStore(client("operator"), "news")
    range_set, inspect = random_range_set(1)
    published = store.range_sets.publish(range_set, inspect)
    other = store.range_sets.publish(*random_range_set(2))
    assert {each.id for each in store.range_sets.list()} == {published, other}
    store.activate(published)
    store.set_erasure(LiveErasure(erasure=Erasure(concept=range_set.concepts[0]), expires_at=time.time() + 60))
    store.expire(time.time() + 120)
    assert [each.action for each in store.audit()] == ["expire", "set", "activate", "create"]
    assert store.live_state().erasures == ()
    store.range_sets.export_file(published, tmp_path / "out.safetensors")
    elsewhere = RangeStore(store.client, "elsewhere")
    assert elsewhere.range_sets.publish(*read_archive(tmp_path / "out.safetensors")) == published
    elsewhere.range_sets.remove(published)
    store.range_sets.remove(other)
    assert [each.id for each in store.range_sets.list()] == [published]
    assert store.range_sets.read_inspect(published, next(iter(range_set.layers))) is not None
    assert list(store.client.scan_iter("neuronlens:rangesets:*")) == [b"neuronlens:rangesets:news"]
    # API keys are one document that a script changes
    put = store.client.register_script("return redis.call('SET', KEYS[1], ARGV[1])")
    put(["neuronlens:keys"], ["{}"])
    assert client("service").get("neuronlens:keys") == b"{}"


def test_service_toggles_and_follows_but_cannot_publish(client: Client) -> None:
    operator = RangeStore(client("operator"), "news")
    range_set, inspect = random_range_set(1)
    published = operator.range_sets.publish(range_set, inspect)
    store = RangeStore(client("service"), "news")
    store.activate(published)
    assert [each.id for each in store.range_sets.list()] == [published]
    replica = new_replica_name()
    mirror = Mirror(store, range_set.provenance.model.fingerprint, poll=300.0, replica=replica)
    mirror.start()
    try:
        until(lambda: mirror.snapshot is not None)
        for reader in (operator, store):
            replicas = ReplicaRegistry(reader.client, "news")
            until(lambda replicas=replicas: not replicas.read().missing(store.live_state().generation))
            assert [each.name for each in replicas.read().replicas] == [replica]

        def notified() -> bool:  # the mirror may not have subscribed yet at the first change
            soon = time.time() + 3600
            operator.set_erasure(LiveErasure(erasure=Erasure(concept=range_set.concepts[0]), expires_at=soon))
            return mirror.snapshot is not None and bool(mirror.snapshot.live.erasures)

        until(notified)
        assert mirror.problem is None
        store.expire(time.time() + 7200)
        store.set_erasures([LiveErasure(erasure=Erasure(concept=range_set.concepts[1]))], by="key:someone")
        assert store.audit()[0].by == "key:someone"
        assert store.remove_erasure(range_set.concepts[1]).erasures == ()
        until(lambda: mirror.snapshot is not None and mirror.snapshot.live == store.live_state())
    finally:
        mirror.close()
    jobs = JobStore(store.client, "news")
    job = jobs.add({"data": "a.jsonl"}, "key:someone", None, "fingerprint", max_pending=1)
    assert jobs.hold_lease("runner", job.id, {})
    jobs.update(job, state="running")
    jobs.release_lease("runner")
    assert [each.state for each in JobStore(operator.client, "news").read().jobs] == ["running"]
    assert ReplicaRegistry(operator.client, "news").read().replicas == ()
    with pytest.raises(StoreUnavailable, match="ACL"):
        store.range_sets.publish(*random_range_set(2))
    with pytest.raises(StoreUnavailable, match="ACL"):
        RangeStore(store.client, "other").range_sets.publish(range_set, inspect)
    put = store.client.register_script("return redis.call('SET', KEYS[1], ARGV[1])")
    for key in ("neuronlens:keys", "neuronlens:rangesets:news", f"neuronlens:rangeset:{published}:meta"):
        with pytest.raises(redis.ResponseError):
            put([key], ["{}"])
        with pytest.raises(redis.exceptions.NoPermissionError):
            store.client.set(key, "{}")
    assert operator.range_sets.read(published).layers.keys() == range_set.layers.keys(), "the range set is intact"


REFUSED: dict[str, tuple[Any, ...]] = {
    "empty all databases": ("FLUSHALL",),
    "empty one database": ("FLUSHDB",),
    "change the configuration": ("CONFIG", "SET", "appendonly", "no"),
    "read the configuration": ("CONFIG", "GET", "*"),
    "list all keys": ("KEYS", "*"),
    "shut it down": ("SHUTDOWN", "NOSAVE"),
    "debug objects": ("DEBUG", "OBJECT", "neuronlens:live:news"),
    "monitor all commands": ("MONITOR",),
    "create users": ("ACL", "SETUSER", "me", "on", "nopass", "+@all", "~*"),
    "list users": ("ACL", "LIST"),
    "make it a replica of another": ("REPLICAOF", "192.0.2.1", "6379"),
    "load a module": ("MODULE", "LOAD", "/tmp/evil.so"),
    "list connections": ("CLIENT", "LIST"),
    "close connections": ("CLIENT", "KILL", "TYPE", "normal"),
    "run any script": ("EVAL", "return 1", "0"),
    "read other keys": ("GET", "session:42"),
    "write other keys": ("SET", "session:42", "x"),
    "delete its own keys": ("DEL", "neuronlens:live:news"),
    "publish to other channels": ("PUBLISH", "__keyspace@0__:x", "x"),
    "subscribe to other channels": ("SUBSCRIBE", "news"),
}


@pytest.mark.parametrize("action", REFUSED)
@pytest.mark.parametrize("user", ["service", "operator", "monitor"])
def test_no_user_can(shared_store_server: Store, user: str, action: str) -> None:
    refusal = "no permissions|not allowed|permissions to"  # of the user's rules, or of the configuration
    with redis.Redis.from_url(shared_store_server.url(user)) as each, pytest.raises(redis.ResponseError, match=refusal):
        each.execute_command(*REFUSED[action])


@pytest.mark.parametrize("user", ["service", "operator"])
def test_script_cannot_access_other_keys(shared_store_server: Store, user: str) -> None:
    with redis.Redis.from_url(shared_store_server.url(user)) as each:
        script = each.register_script("return redis.call('SET', ARGV[1], 'x')")
        with pytest.raises(redis.ResponseError, match="can't access"):
            script(["neuronlens:live:news"], ["session:42"])


def test_login_is_required(shared_store_server: Store) -> None:
    address = f"127.0.0.1:{shared_store_server.port}/0"
    with redis.Redis.from_url(f"redis://{address}") as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    for wrong in (f"redis://default:x@{address}", f"redis://service:{PASSWORDS['operator']}@{address}"):
        with redis.Redis.from_url(wrong) as nobody, pytest.raises(redis.AuthenticationError):
            nobody.ping()
    with redis.Redis.from_url(shared_store_server.url("monitor")) as monitor:
        assert monitor.ping()
        assert monitor.info("persistence")["aof_enabled"] == 1


def test_passwords_are_stored_as_hashes_only(shared_store_server: Store) -> None:
    written = (shared_store_server.directory / "users.acl").read_text()
    assert "@" not in written.replace("+@", ""), "a password was not filled in"
    committed = (DOCKER / "redis" / "users.acl").read_text()
    for password in PASSWORDS.values():
        assert password not in written + committed
    assert (shared_store_server.directory / "users.acl").stat().st_mode & 0o077 == 0


def test_acknowledged_toggle_survives_sigkill(store_server: Store, client: Client) -> None:
    range_set, inspect = random_range_set(1)
    operator = RangeStore(client("operator"), "news")
    operator.activate(operator.range_sets.publish(range_set, inspect))
    store = RangeStore(client("service"), "news")
    for turn in range(2):
        acknowledged = store.set_erasure(LiveErasure(erasure=Erasure(concept=range_set.concepts[0], tau=1.0 + turn)))
        store_server.kill()
        store_server.start()
        assert store.live_state() == acknowledged
    assert store.audit()[0].after == acknowledged.generation
