"""What one server knows of the keys: in force for good, whatever becomes of Redis."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from app.keyring import LOST, Keyring, Refused, memory_of
from range_store.api_keys import KeyStore
from range_store.embedded import connect
from range_store.keys import API_KEYS


@pytest.fixture
def store(redis_client: redis.Redis) -> Iterator[KeyStore]:
    yield KeyStore(redis_client)
    redis_client.delete(API_KEYS)  # the other tests of this Redis need none


def refused(keyring: Keyring, token: str | None) -> str:
    with pytest.raises(Refused) as caught:
        keyring.identify(token)
    return caught.value.reason


def test_without_keys_none_is_needed_until_the_first_is_made(store: KeyStore) -> None:
    keyring = Keyring(store)
    keyring.refresh()
    assert not keyring.in_force
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    assert keyring.in_force
    assert keyring.identify(token).name == "app"
    assert refused(keyring, None) == "no_key"
    assert refused(keyring, "nl_wrong") == "bad_key"


def test_revoked_and_expired_keys_open_nothing(store: KeyStore) -> None:
    keyring = Keyring(store)
    _, revoked = store.create("a", ["infer"])
    _, expired = store.create("b", ["infer"], expires_at=time.time() - 0.001)
    store.revoke("a")
    keyring.refresh()
    assert refused(keyring, revoked) == refused(keyring, expired) == "bad_key"


def test_keys_that_vanish_stay_in_force_here_and_refuse_everyone_after_a_restart(
    store: KeyStore, redis_client: redis.Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = memory_of(tmp_path, "redis")
    keyring = Keyring(store, memory=memory)
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    redis_client.delete(API_KEYS)
    for _ in range(3):
        keyring.refresh()
    assert keyring.identify(token).name == "app"
    assert [record.levelno for record in caplog.records if LOST in record.message] == [logging.ERROR]
    started_again = Keyring(store, memory=memory)
    started_again.refresh()
    assert started_again.in_force
    assert refused(started_again, token) == refused(started_again, None) == "keys_unavailable"
    assert not Keyring(store, memory=memory_of(tmp_path, "another redis")).in_force


def test_required_keys_refuse_everyone_until_they_are_known(store: KeyStore) -> None:
    keyring = Keyring(store, required=True)
    keyring.refresh()
    assert refused(keyring, None) == "keys_unavailable"
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    assert keyring.identify(token).name == "app"


def test_an_older_list_brings_no_revoked_key_back(store: KeyStore, redis_client: redis.Redis) -> None:
    keyring = Keyring(store)
    _, token = store.create("app", ["infer"])
    old = redis_client.get(API_KEYS)
    store.revoke("app")
    keyring.refresh()
    assert isinstance(old, bytes)
    redis_client.set(API_KEYS, old)
    keyring.refresh()
    assert refused(keyring, token) == "bad_key"
    _, fresh = store.create("new", ["infer"])  # an operator's change settles what is to be
    keyring.refresh()
    assert keyring.identify(fresh).name == "new"


def test_an_unreadable_list_changes_nothing(store: KeyStore, redis_client: redis.Redis) -> None:
    keyring = Keyring(store)
    _, token = store.create("app", ["infer"])
    keyring.refresh()
    redis_client.set(API_KEYS, b"nonsense")
    keyring.refresh()
    assert keyring.identify(token).name == "app"


def test_redis_away_from_the_start_refuses_everyone_if_keys_are_required(tmp_path: Path) -> None:
    with connect(f"unix://{tmp_path}/nothing.sock", tmp_path) as client:
        keyring = Keyring(KeyStore(client), required=True)
        keyring.refresh()
        assert refused(keyring, "nl_") == "keys_unavailable"


def test_a_memory_that_cannot_be_written_is_told(
    store: KeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    keyring = Keyring(store, memory=memory_of(tmp_path / "file", "redis"))
    store.create("app", ["infer"])
    keyring.refresh()
    assert keyring.in_force
    assert any("NEURONLENS_REQUIRE_KEYS" in record.message for record in caplog.records)
