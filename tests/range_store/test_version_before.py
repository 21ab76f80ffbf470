"""What the version before stored is read: the files in `version_before` were made by its code (see `make.py` there)."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from range_store.domain.plan import resolve
from range_store.embedded.connection import connect
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.archive import encode_archive, read_archive
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore

DIRECTORY = Path(__file__).parent / "version_before"
STORED: dict[str, Any] = json.loads((DIRECTORY / "stored.json").read_text())
BEFORE = STORED["read_back"]
"""What the version before read from what it stored."""


def write(client: redis.Redis, key: str, stored: dict[str, Any]) -> None:
    match stored["type"]:
        case "string":
            client.set(key, stored["text"] if "text" in stored else base64.b64decode(stored["base64"]))
        case "set":
            client.sadd(key, *stored["members"])
        case "zset":
            client.zadd(key, stored["scores"])
        case "hash":
            client.hset(key, mapping=stored["fields"])
        case "stream":
            for entry in stored["entries"]:
                client.xadd(key, entry["fields"], id=entry["id"])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A Redis that holds what the version before stored, and nothing else."""
    with connect(None, tmp_path_factory.mktemp("redis")) as client:
        for key, stored in STORED["redis"].items():
            write(client, key, stored)
        yield client


@pytest.fixture
def store(client: redis.Redis) -> RangeStore:
    return RangeStore(client, "news")


def test_range_set_is_read_with_its_id(store: RangeStore) -> None:
    (listed,) = store.range_sets.list()
    assert {"id": listed.id, "published_at": listed.published_at} == BEFORE["published"][0]
    assert listed.active
    range_set = store.range_sets.read(listed.id)
    assert range_set.provenance.model_dump(mode="json") == BEFORE["provenance"]
    layer = range_set.layer(1)
    assert (layer.mean.tolist(), layer.std.tolist()) == (BEFORE["mean"], BEFORE["std"])
    assert {ranking: values.tolist() for ranking, values in layer.saliency.items()} == BEFORE["saliency"]
    assert store.range_sets.read_inspect(listed.id, 1).histogram.tolist() == BEFORE["histogram"]


def test_live_erasures_are_read_and_resolved(store: RangeStore) -> None:
    live = store.live_state()
    assert live.model_dump(mode="json") == BEFORE["live"]
    assert [(each.concept, each.enforced) for each in live.erasures] == [("Sci/Tech", True), ("Économie", False)]
    assert live.continues, "the epoch that it took over is lost"
    plan = resolve(store.range_sets.read(str(live.range_set)), [each.erasure for each in live.erasures])
    assert sorted(plan.edits) == [0, 1]
    snapshot = Mirror(store, BEFORE["provenance"]["model"]["fingerprint"]).refresh()
    assert (snapshot.live, snapshot.range_set and snapshot.range_set.id) == (live, live.range_set)


def test_audit_is_read(store: RangeStore) -> None:
    assert [entry.model_dump(mode="json") for entry in store.audit()] == BEFORE["audit"]
    assert store.has_change_for("0123456789abcdef")


def test_replicas_are_read(store: RangeStore) -> None:
    roster = store.replicas.read()
    assert [replica.model_dump(mode="json") for replica in roster.replicas] == BEFORE["replicas"]
    assert roster.missing(BEFORE["live"]["generation"]) == ()


def test_api_keys_are_read_and_open(client: redis.Redis) -> None:
    keys = ApiKeyStore(client).read()
    assert keys is not None
    assert keys.model_dump(mode="json") == BEFORE["keys"]
    found = keys.find_by_token(BEFORE["token"])
    assert found is not None
    assert (found.name, found.rate_limit) == ("dashboard", "600/minute")
    assert [each.name for each in keys.valid(found.created_at)] == ["dashboard"]


def test_archive_is_imported_under_its_id(store: RangeStore) -> None:
    path = DIRECTORY / "range_set.safetensors"
    assert store.range_sets.publish(*read_archive(path)) == BEFORE["published"][0]["id"]
    assert encode_archive(*read_archive(path)) == path.read_bytes(), "it is written differently now"


def test_change_continues_from_what_was_stored(store: RangeStore) -> None:
    before = store.live_state()
    after = store.remove_erasure("Économie", if_match=before.generation)
    assert (after.epoch, after.counter, after.continues) == (before.epoch, before.counter + 1, before.continues)
    assert [each.concept for each in after.erasures] == ["Sci/Tech"]
