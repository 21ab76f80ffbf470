"""Writes the files beside this one: what the version before `range_store` had folders stored.

It ran once, on a checkout of commit 7daa738, whose modules it imports:

    PYTHONPATH=CHECKOUT python tests/range_store/version_before/make.py
"""

import base64
import json
import secrets
import tempfile
from pathlib import Path

from range_store.api_keys import KeyStore
from range_store.embedded import connect
from range_store.erasure import Damp, Erasure
from range_store.live import LiveErasure
from range_store.store import RangeStore
from tests.range_store.builders import random_range_set

HERE = Path(__file__).parent
YEAR_2100 = 4102444800.0
TOKEN = "0" * 43


def text_or_base64(data):
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def stored_value(client, key):
    match client.type(key):
        case b"string":
            return {"type": "string", **text_or_base64(client.get(key))}
        case b"set":
            return {"type": "set", "members": sorted(member.decode() for member in client.smembers(key))}
        case b"zset":
            scores = client.zrange(key, 0, -1, withscores=True)
            return {"type": "zset", "scores": {member.decode(): score for member, score in scores}}
        case b"hash":
            return {"type": "hash", "fields": {k.decode(): v.decode() for k, v in client.hgetall(key).items()}}
        case b"stream":
            entries = [(id_.decode(), fields) for id_, fields in client.xrange(key)]
            decoded = [{"id": i, "fields": {k.decode(): v.decode() for k, v in each.items()}} for i, each in entries]
            return {"type": "stream", "entries": decoded}


def fill(client):
    """Store something of each kind; returns what the version before reads back."""
    store = RangeStore(client, "news")
    range_set, inspect = random_range_set(7, concepts=("Sci/Tech", "Économie"), hidden=4, n_layers=2, bins=2)
    store.publish(range_set, inspect)
    store.export(range_set.id, HERE / "range_set.safetensors")
    store.activate(range_set.id, by="ops", reason="first fit")
    erasure = Erasure(concept="Sci/Tech", top_fraction=0.5, layers="all", replacement=Damp(damp=0.25))
    store.set_erasure(
        LiveErasure(erasure=erasure, enforced=True, reason="policy 12", by="ops"), request="0123456789abcdef"
    )
    erasure = Erasure(concept="Économie", method="neuron", ranking="selectivity", replacement="mean")
    lost = store.set_erasure(LiveErasure(erasure=erasure, expires_at=YEAR_2100, by="ops"))
    client.delete(store.keys.live)
    live, _ = store.put_back(lost)  # in a new epoch, which names the one that it continues
    store.replicas.report("host:7:a1b2c3d4", live.generation, live.range_set, 3e9, "host:9090", "bfloat16")

    keys = KeyStore(client)
    secrets.token_urlsafe = lambda _: TOKEN
    _, token = keys.create("dashboard", ["read", "infer"], expires_at=YEAR_2100, rate_limit="600/minute", by="ops")
    keys.create("gone", ["admin"])
    keys.revoke("gone", by="ops")
    layer, inspected = range_set.layer(1), inspect[1]
    return {
        "published": [{"id": each.id, "published_at": each.published_at} for each in store.list()],
        "provenance": range_set.provenance.model_dump(mode="json"),
        "mean": layer.mean.tolist(),
        "std": layer.std.tolist(),
        "saliency": {ranking: values.tolist() for ranking, values in layer.saliency.items()},
        "histogram": inspected.histogram.tolist(),
        "live": store.live().model_dump(mode="json"),
        "audit": [entry.model_dump(mode="json") for entry in store.audit()],
        "replicas": [replica.model_dump(mode="json") for replica in store.replicas.read().replicas],
        "token": token,
        "keys": keys.read().model_dump(mode="json"),
    }


def main():
    with tempfile.TemporaryDirectory() as directory, connect(None, Path(directory)) as client:
        read_back = fill(client)
        keys = {key: stored_value(client, key) for key in sorted(each.decode() for each in client.scan_iter())}
    text = json.dumps({"redis": keys, "read_back": read_back}, indent=1, ensure_ascii=False)
    (HERE / "stored.json").write_text(text + "\n")


main()
