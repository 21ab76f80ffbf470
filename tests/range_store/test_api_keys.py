"""API keys in the store: only hashes are stored, and concurrent changes are all kept."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from range_store.errors import InvalidKey, UnknownKey
from range_store.storage.api_keys import REVOKED_KEPT, SCOPES, ApiKey, ApiKeys, ApiKeyStore
from range_store.storage.schema import API_KEYS


@pytest.fixture
def store(own_redis: redis.Redis) -> ApiKeyStore:
    return ApiKeyStore(own_redis)


def read(store: ApiKeyStore) -> ApiKeys:
    keys = store.read()
    assert keys is not None
    return keys


def test_store_without_keys_reads_as_none(store: ApiKeyStore) -> None:
    assert store.read() is None


def test_only_the_exact_token_finds_its_key(store: ApiKeyStore) -> None:
    app, app_token = store.create("app", ["infer"])
    ops, ops_token = store.create("ops", ["admin"])
    keys = read(store)
    assert keys.find_by_token(app_token) == app
    assert keys.find_by_token(ops_token) == ops
    mixed = app_token[:12] + ops_token[12:]  # the id of one, the secret of the other
    for wrong in (mixed, "", "nl_", app_token[:-1], app_token + "a", app_token.upper(), f" {app_token}", "ü" * 50):
        assert keys.find_by_token(wrong) is None


@given(st.text(max_size=80))
def test_unknown_token_of_any_text_finds_no_key(token: str) -> None:
    assert ApiKeys(changed_at=0.0).find_by_token(token) is None


def test_token_is_not_stored(store: ApiKeyStore, own_redis: redis.Redis) -> None:
    _, token = store.create("app", ["infer"])
    stored = own_redis.get(API_KEYS)
    assert isinstance(stored, bytes)
    assert token[12:].encode() not in stored


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (["infer"], {"infer"}),
        (["read"], {"read"}),
        (["read", "infer"], {"infer", "read"}),
        (["admin"], {"infer", "read", "admin"}),
    ],
)
def test_admin_has_every_scope_and_other_keys_their_own(
    store: ApiKeyStore, scopes: list[str], allowed: set[str]
) -> None:
    key, _ = store.create("a", scopes)  # type: ignore[arg-type]
    assert {scope for scope in SCOPES if key.allows(scope)} == allowed


def test_keys_stay_required_after_the_last_is_revoked(store: ApiKeyStore) -> None:
    key, token = store.create("app", ["infer"])
    store.revoke("app", by="ops")
    keys = read(store)
    assert keys.valid(time.time()) == ()
    revoked = keys.find_by_token(token)
    assert revoked is not None
    assert (revoked.id, revoked.revoked_by, revoked.is_valid(time.time())) == (key.id, "ops", False)


def test_key_is_revoked_by_name_or_id_once(store: ApiKeyStore) -> None:
    key, _ = store.create("app", ["infer"])
    store.revoke(key.id)
    for name in ("app", key.id, "nobody"):
        with pytest.raises(UnknownKey):
            store.revoke(name)


def test_name_of_a_revoked_or_expired_key_can_be_used_again(store: ApiKeyStore) -> None:
    store.create("app", ["infer"])
    with pytest.raises(InvalidKey, match="already"):
        store.create("app", ["read"])
    store.revoke("app")
    old, _ = store.create("app", ["read"], expires_at=time.time() - 1)
    new, _ = store.create("app", ["infer"])
    assert store.revoke("app").id == new.id  # the valid key, not the expired one
    assert not old.is_valid(time.time())


@pytest.mark.parametrize("name", ["", " ", "-a", "a b", "a\nb", "é", "a" * 65])
def test_unsafe_name_is_refused(store: ApiKeyStore, name: str) -> None:
    with pytest.raises(InvalidKey, match="name"):
        store.create(name, ["infer"])
    assert store.read() is None


def test_key_without_a_scope_is_refused(store: ApiKeyStore) -> None:
    with pytest.raises(InvalidKey, match="scope"):
        store.create("app", [])


def test_concurrently_created_keys_are_all_kept(store: ApiKeyStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: store.create(f"k{i}", ["infer"])[0].id, range(24)))
    assert {key.id for key in read(store).keys} == set(made)


def test_change_time_increases_even_if_the_clock_goes_back(store: ApiKeyStore, own_redis: redis.Redis) -> None:
    store.create("a", ["infer"])
    ahead = read(store).model_copy(update={"changed_at": time.time() + 3600})
    own_redis.set(API_KEYS, ahead.model_dump_json())
    store.create("b", ["infer"])
    assert read(store).changed_at > ahead.changed_at


def test_oldest_revoked_keys_are_forgotten(store: ApiKeyStore, own_redis: redis.Redis) -> None:
    one, _ = store.create("a", ["infer"])
    revoked = [
        ApiKey(**{**one.model_dump(), "id": f"{i:08x}", "name": f"old{i}", "revoked_at": float(i)})
        for i in range(REVOKED_KEPT + 50)
    ]
    own_redis.set(API_KEYS, ApiKeys(changed_at=1.0, keys=(one, *revoked)).model_dump_json())
    store.create("b", ["infer"])
    kept = read(store).keys
    assert {key.name for key in kept if key.revoked_at is None} == {"a", "b"}
    assert {key.name for key in kept if key.revoked_at is not None} == {f"old{i}" for i in range(50, REVOKED_KEPT + 50)}


@pytest.mark.parametrize("stored", [b"", b"{}", b"\xff", b'{"changed_at": 1, "keys": [{}]}', b"[]"])
def test_unreadable_document_is_an_error(store: ApiKeyStore, own_redis: redis.Redis, stored: bytes) -> None:
    own_redis.set(API_KEYS, stored)
    with pytest.raises(InvalidKey, match="unreadable"):
        store.read()
    with pytest.raises(InvalidKey):
        store.create("app", ["infer"])
