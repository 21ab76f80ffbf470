"""The keys that one server knows: they stay in force whatever happens to Redis."""

import logging
import stat
import time
from pathlib import Path

import pytest

from app.security.keyring import LOST, Keyring, Refused, memory_of
from range_store.embedded.connection import EmbeddedRedis, connect
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.schema import API_KEYS


@pytest.fixture
def store(own_redis: EmbeddedRedis) -> ApiKeyStore:
    return ApiKeyStore(own_redis)


def refused(keyring: Keyring, token: str | None) -> str:
    with pytest.raises(Refused) as caught:
        keyring.identify(token)
    return caught.value.code


def test_no_key_is_required_until_the_first_is_created(store: ApiKeyStore) -> None:
    keyring = Keyring(store)
    keyring.refresh()
    assert not keyring.in_force
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    assert keyring.in_force
    assert keyring.identify(token).name == "app"
    assert refused(keyring, None) == "no_key"
    assert refused(keyring, "nl_wrong") == "bad_key"


def test_revoked_and_expired_keys_are_rejected(store: ApiKeyStore) -> None:
    keyring = Keyring(store)
    _, revoked = store.create("a", ["infer"])
    _, expired = store.create("b", ["infer"], expires_at=time.time() - 1)
    store.revoke("a")
    keyring.refresh()
    assert refused(keyring, revoked) == refused(keyring, expired) == "bad_key"


def test_keys_that_redis_loses_stay_in_force_and_survive_a_restart_as_a_lockout(
    store: ApiKeyStore, own_redis: EmbeddedRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = memory_of(tmp_path / "new", "redis")
    keyring = Keyring(store, memory=memory)
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    own_redis.delete(API_KEYS)
    for _ in range(3):
        keyring.refresh()
    assert keyring.identify(token).name == "app"
    assert [record.levelno for record in caplog.records if LOST in record.message] == [logging.ERROR]
    for private in (tmp_path / "new", memory.parent):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    started_again = Keyring(store, memory=memory)
    started_again.refresh()
    assert started_again.in_force
    assert refused(started_again, token) == refused(started_again, None) == "keys_unavailable"
    assert not Keyring(store, memory=memory_of(tmp_path, "another redis")).in_force


def test_required_keys_reject_everyone_until_keys_are_known(store: ApiKeyStore) -> None:
    keyring = Keyring(store, required=True)
    keyring.refresh()
    assert refused(keyring, None) == "keys_unavailable"
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    assert keyring.identify(token).name == "app"


def test_an_older_list_does_not_restore_a_revoked_key(store: ApiKeyStore, own_redis: EmbeddedRedis) -> None:
    keyring = Keyring(store)
    _, token = store.create("app", ["infer"])
    old = own_redis.get(API_KEYS)
    store.revoke("app")
    keyring.refresh()
    assert isinstance(old, bytes)
    own_redis.set(API_KEYS, old)
    keyring.refresh()
    assert refused(keyring, token) == "bad_key"
    _, fresh = store.create("new", ["infer"])  # a change by an operator is newer than both lists
    keyring.refresh()
    assert keyring.identify(fresh).name == "new"


def test_an_unreadable_list_is_ignored(store: ApiKeyStore, own_redis: EmbeddedRedis) -> None:
    keyring = Keyring(store)
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    own_redis.set(API_KEYS, b"nonsense")
    keyring.refresh()
    assert keyring.identify(token).name == "app"


def test_required_keys_reject_everyone_while_redis_is_unreachable(tmp_path: Path) -> None:
    with connect(f"unix://{tmp_path}/nothing.sock", tmp_path) as client:
        keyring = Keyring(ApiKeyStore(client), required=True)
        keyring.refresh()
        assert refused(keyring, "nl_") == "keys_unavailable"


def test_a_memory_file_that_cannot_be_written_is_logged(
    store: ApiKeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    keyring = Keyring(store, memory=memory_of(tmp_path / "file", "redis"))
    store.create("app", ["infer"])
    keyring.refresh()
    assert keyring.in_force
    assert any("NEURONLENS_REQUIRE_KEYS" in record.message for record in caplog.records)
