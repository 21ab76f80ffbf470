"""API keys in the store: shown once, hashed, changed by one at a time."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from range_store.api_keys import REVOKED_KEPT, SCOPES, ApiKey, Keys, KeyStore
from range_store.errors import InvalidKey, UnknownKey
from range_store.keys import API_KEYS


@pytest.fixture
def store(redis_client: redis.Redis) -> Iterator[KeyStore]:
    yield KeyStore(redis_client)
    redis_client.delete(API_KEYS)  # the other tests of this Redis need none


def read(store: KeyStore) -> Keys:
    keys = store.read()
    assert keys is not None
    return keys


def test_no_document_means_that_there_never_were_keys(store: KeyStore) -> None:
    assert store.read() is None


def test_a_token_finds_its_key_and_no_other_opens_anything(store: KeyStore) -> None:
    app, app_token = store.create("app", ["infer"])
    ops, ops_token = store.create("ops", ["admin"])
    keys = read(store)
    assert keys.of_token(app_token) == app
    assert keys.of_token(ops_token) == ops
    mixed = app_token[:12] + ops_token[12:]  # the id of one, the secret of the other
    for wrong in (mixed, "", "nl_", app_token[:-1], app_token + "a", app_token.upper(), f" {app_token}", "ü" * 50):
        assert keys.of_token(wrong) is None


@given(st.text(max_size=80))
def test_no_text_at_all_is_an_error(token: str) -> None:
    assert Keys(changed_at=0.0).of_token(token) is None


def test_the_store_never_holds_a_token(store: KeyStore, redis_client: redis.Redis) -> None:
    _, token = store.create("app", ["infer"])
    stored = redis_client.get(API_KEYS)
    assert isinstance(stored, bytes)
    assert token[12:].encode() not in stored


@pytest.mark.parametrize(
    ("scopes", "may"),
    [
        (["infer"], {"infer"}),
        (["read"], {"read"}),
        (["read", "infer"], {"infer", "read"}),
        (["admin"], {"infer", "read", "admin"}),
    ],
)
def test_admin_may_do_everything_and_the_others_what_they_say(
    store: KeyStore, scopes: list[str], may: set[str]
) -> None:
    key, _ = store.create("a", scopes)  # type: ignore[arg-type]
    assert {scope for scope in SCOPES if key.may(scope)} == may


def test_revoking_the_last_key_leaves_keys_in_force(store: KeyStore) -> None:
    key, token = store.create("app", ["infer"])
    store.revoke("app", by="ops")
    keys = read(store)
    assert keys.good(time.time()) == ()
    revoked = keys.of_token(token)
    assert revoked is not None
    assert (revoked.id, revoked.revoked_by, revoked.good(time.time())) == (key.id, "ops", False)


def test_revoking_by_id_or_twice(store: KeyStore) -> None:
    key, _ = store.create("app", ["infer"])
    store.revoke(key.id)
    for name in ("app", key.id, "nobody"):
        with pytest.raises(UnknownKey):
            store.revoke(name)


def test_a_name_is_free_again_after_its_key_has_ended(store: KeyStore) -> None:
    store.create("app", ["infer"])
    with pytest.raises(InvalidKey, match="already"):
        store.create("app", ["read"])
    store.revoke("app")
    old, _ = store.create("app", ["read"], expires_at=time.time() - 1)
    new, _ = store.create("app", ["infer"])
    assert store.revoke("app").id == new.id  # the one that opens something, not the expired one
    assert not old.good(time.time())


@pytest.mark.parametrize("name", ["", " ", "-a", "a b", "a\nb", "é", "a" * 65])
def test_names_are_safe_to_log(store: KeyStore, name: str) -> None:
    with pytest.raises(InvalidKey, match="name"):
        store.create(name, ["infer"])
    assert store.read() is None


def test_a_key_needs_a_scope(store: KeyStore) -> None:
    with pytest.raises(InvalidKey, match="scope"):
        store.create("app", [])


def test_many_at_once_lose_nothing(store: KeyStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: store.create(f"k{i}", ["infer"])[0].id, range(24)))
    assert {key.id for key in read(store).keys} == set(made)


def test_each_change_is_later_than_the_one_before_whatever_the_clock_says(
    store: KeyStore, redis_client: redis.Redis
) -> None:
    store.create("a", ["infer"])
    ahead = read(store).model_copy(update={"changed_at": time.time() + 3600})
    redis_client.set(API_KEYS, ahead.model_dump_json())
    store.create("b", ["infer"])
    assert read(store).changed_at > ahead.changed_at


def test_only_so_many_revoked_keys_are_remembered(store: KeyStore, redis_client: redis.Redis) -> None:
    one, _ = store.create("a", ["infer"])
    gone = [
        ApiKey(**{**one.model_dump(), "id": f"{i:08x}", "name": f"old{i}", "revoked_at": float(i)})
        for i in range(REVOKED_KEPT + 50)
    ]
    redis_client.set(API_KEYS, Keys(changed_at=1.0, keys=(one, *gone)).model_dump_json())
    store.create("b", ["infer"])
    kept = read(store).keys
    assert {key.name for key in kept if key.revoked_at is None} == {"a", "b"}
    assert {key.name for key in kept if key.revoked_at is not None} == {f"old{i}" for i in range(50, REVOKED_KEPT + 50)}


@pytest.mark.parametrize("stored", [b"", b"{}", b"\xff", b'{"changed_at": 1, "keys": [{}]}', b"[]"])
def test_an_unreadable_document_is_an_error_and_never_no_keys(
    store: KeyStore, redis_client: redis.Redis, stored: bytes
) -> None:
    redis_client.set(API_KEYS, stored)
    with pytest.raises(InvalidKey, match="unreadable"):
        store.read()
    with pytest.raises(InvalidKey):
        store.create("app", ["infer"])
