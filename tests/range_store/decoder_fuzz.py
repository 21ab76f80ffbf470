"""A fuzz target for everything that is decoded from Redis or from a file: `python -m tests.range_store.decoder_fuzz`.

Hypothesis damages valid bytes, or the JSON or arrays in them, and then often recomputes the checksums, so that the
damage gets past them. A decoder may refuse with its documented error, or return something whose encoding is the same
bytes. Anything else fails, and so do five seconds of CPU time or half a gigabyte of memory; Hypothesis then prints the
smallest such input.
"""

import argparse
import hashlib
import json
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from range_store.domain.erasure import Damp, Erasure
from range_store.domain.live import LiveErasure, LiveState
from range_store.embedded.connection import connect
from range_store.errors import InvalidKey, InvalidRangeSet
from range_store.storage.api_keys import ApiKeys, ApiKeyStore
from range_store.storage.archive import ENTRY, Archive, decode_archive, encode_archive
from range_store.storage.codec import (
    Metadata,
    assemble,
    decode_inspect,
    decode_metadata,
    decode_serve,
    describe,
    encode_layer,
    encode_metadata,
    encode_parts,
    inspect_part,
    serve_part,
)
from range_store.storage.schema import API_KEYS
from range_store.storage.store import RangeStore
from tests.range_store.builders import random_range_set

MEMORY = 512 * 1024 * 1024
CPU_SECONDS = 5

MADE, INSPECT = random_range_set(3, ("Sci/Tech", "\u2028é'\"\\"), hidden=3, n_layers=2, bins=2)
OTHER, OTHER_INSPECT = random_range_set(4, ("a",), hidden=1, n_layers=1, bins=1)
META, _ = describe(MADE.provenance, MADE.layers, INSPECT)
PARTS = dict(encode_parts(MADE.provenance, MADE.layers, INSPECT))
LIVE = LiveState(
    generation="0123abcd-7",
    range_set=MADE.id,
    erasures=(
        LiveErasure(erasure=Erasure(concept="Sci/Tech", replacement=Damp(damp=0.5)), reason="why", expires_at=2e9),
        LiveErasure(erasure=Erasure(concept="é", layers="all", method="neuron"), enforced=True, by="http"),
    ),
)
KEYS = ApiKeys.model_validate(
    {
        "changed_at": 1.7e9,
        "keys": [
            {"id": "0123abcd", "name": "ann", "scopes": ["infer", "read"], "sha256": "ab" * 32, "created_at": 1.7e9},
            {
                "id": "4567abcd",
                "name": "bob",
                "scopes": ["admin"],
                "sha256": "cd" * 32,
                "created_at": 1,
                "revoked_at": 2,
            },
        ],
    }
)
VALID = {
    "meta": encode_metadata(META),
    "serve": PARTS[serve_part(0)],
    "inspect": PARTS[inspect_part(1)],
    "archive": encode_archive(MADE, INSPECT),
    "live": LIVE.model_dump_json().encode(),
    "keys": KEYS.model_dump_json().encode(),
}
DONORS = (*VALID.values(), encode_archive(OTHER, OTHER_INSPECT), b"{}", b"[]", b'{"a":' * 50_000, b"[" * 100_000)
NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**400, -0.0, 0.5, 1e308, 5e-324)
SCALARS = (
    *(None, True, False, "", "a", "0", "F64", "U32", "F32", "I64", "BF16", "nan", "\x00", "\ud800", "x" * 5000),
    *(float("nan"), float("inf"), "0" * 64, "zero", "all", *NUMBERS),
)


VALUES = st.one_of(
    st.sampled_from(SCALARS),
    st.lists(st.sampled_from(NUMBERS), max_size=4),
    # parsed anew each time, since further damage changes them in place
    st.sampled_from(["{}", "[[]]", '{"": null}', json.dumps([1] * 3000), "[" * 100 + "]" * 100]).map(json.loads),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Flip bits, cut, insert, repeat, splice with other data, or change the length field."""
    place = draw(st.integers(0, max(0, len(data) - 1)))
    length = draw(st.integers(0, 64))
    match draw(st.sampled_from(("flip", "flip", "cut", "drop", "insert", "repeat", "splice", "length", "random"))):
        case "flip":
            flipped = bytearray(data)
            for _ in range(draw(st.integers(1, 4))):
                if flipped:
                    flipped[draw(st.integers(0, len(flipped) - 1))] ^= 1 << draw(st.integers(0, 7))
            return bytes(flipped)
        case "cut":
            return data[:place]
        case "drop":
            return data[:place] + data[place + length :]
        case "insert":
            return data[:place] + draw(st.binary(max_size=16)) + data[place:]
        case "repeat":
            return data[:place] + data[place : place + length] * draw(st.integers(2, 50)) + data[place + length :]
        case "splice":
            other = draw(st.sampled_from(DONORS))
            return data[:place] + other[draw(st.integers(0, len(other))) :]
        case "length":
            near = struct.unpack_from("<Q", data)[0] + draw(st.integers(-9, 9)) if len(data) >= 8 else 0
            lie = draw(st.sampled_from((0, 1, 7, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1, max(0, near) % 2**64)))
            return struct.pack("<Q", lie) + data[8:]
        case _:
            return draw(st.binary(max_size=300))


@st.composite
def damaged_json(draw: st.DrawFn, text: bytes) -> bytes:
    """Replace, remove, swap, add or repeat values of a document, or add white space."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(("set", "set", "set", "remove", "swap", "add"))):
            case "set":
                holder[key] = draw(VALUES)
            case "remove":
                del holder[key]
            case "swap":
                there, other = draw(st.sampled_from(places))
                with suppress(IndexError):
                    holder[key], there[other] = there[other], holder[key]
                if _depth(document) > 500:  # a value inside itself
                    return text
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(("x", "", key + " ", key.upper(), "__metadata__")))] = draw(VALUES)
    written = json.dumps(document, separators=draw(st.sampled_from(((",", ":"), (", ", ": ")))), ensure_ascii=False)
    if draw(st.integers(0, 9)) == 0:  # a field twice, perhaps with another value
        written = written.replace("{", '{"format":1,"id":"a","erasures":[],"mean":{},', 1)
    return written.encode(errors="surrogatepass")


def _places(document: Any) -> Any:
    """Every (holder, key) of a JSON document."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield document, key
            yield from _places(value)
    elif isinstance(document, list):
        for index, value in enumerate(document[:8]):
            yield document, index
            if not isinstance(value, list):
                yield from _places(value)


def _depth(document: Any, depth: int = 0) -> int:
    if depth > 501 or not isinstance(document, dict | list) or not document:
        return depth
    values = document.values() if isinstance(document, dict) else document[:8]
    return max(_depth(value, depth + 1) for value in values)


@st.composite
def damaged_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header has the right length and other contents."""
    length = struct.unpack_from("<Q", data)[0]
    header = draw(damaged_json(data[8 : 8 + length].rstrip()))
    header += b" " * (-len(header) % 8 if draw(st.booleans()) else draw(st.integers(0, 9)))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@st.composite
def damaged_values(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with other numbers: NaN, infinities, −0.0, negative ones."""
    start = 8 + struct.unpack_from("<Q", data)[0]
    count = (len(data) - start) // 8
    for _ in range(draw(st.integers(1, 3))):
        place = start + 8 * draw(st.integers(0, count - 1))
        data = data[:place] + struct.pack("<d", draw(st.floats(width=64))) + data[place + 8 :]
    return data


def resealed(archive: bytes) -> bytes:
    """The archive with the id and digest of its entry recomputed, if it can be read."""
    try:
        length = struct.unpack_from("<Q", archive)[0]
        header = json.loads(archive[8 : 8 + length])
        meta = Metadata.model_validate(json.loads(header["__metadata__"][ENTRY])["meta"])
        sealed = Archive(id=meta.id, meta=meta, sha256=hashlib.sha256(encode_metadata(meta)).hexdigest())
        header["__metadata__"][ENTRY] = sealed.model_dump_json()
        written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, TypeError, KeyError, RecursionError, struct.error):
        return archive
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + archive[8 + length :]


@st.composite
def damaged_entry(draw: st.DrawFn, archive: bytes) -> bytes:
    """An archive with a damaged entry in its header: provenance, id or checksums."""
    length = struct.unpack_from("<Q", archive)[0]
    header = json.loads(archive[8 : 8 + length])
    entry = draw(damaged_json(header["__metadata__"][ENTRY].encode()))
    header["__metadata__"][ENTRY] = entry.decode(errors="replace")
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + archive[8 + length :]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A kind of encoded data, and damaged bytes to decode as that kind."""
    kind = draw(st.sampled_from(sorted(VALID)))
    data = VALID[kind]
    ways: list[Callable[[bytes], st.SearchStrategy[bytes]]] = [damaged_bytes]
    if kind in ("serve", "inspect"):
        ways += [damaged_header, damaged_values]
    elif kind == "archive":
        ways += [damaged_header, damaged_values, damaged_entry]
    else:
        ways += [damaged_json, damaged_json]
    for _ in range(1 if draw(st.integers(0, 3)) else 2):
        try:
            data = draw(draw(st.sampled_from(ways))(data))
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
            break  # too damaged for that kind of damage
    if kind == "archive" and draw(st.booleans()):
        data = resealed(data)
    return kind, data


class Target:
    """Decodes damaged data and counts the outcomes; raises if a decoder misbehaves."""

    def __init__(self, store: RangeStore, keys: ApiKeyStore) -> None:
        self.store, self.key_store = store, keys
        self.outcomes: Counter[str] = Counter()

    def __call__(self, kind: str, data: bytes) -> None:
        refusal = InvalidKey if kind == "keys" else InvalidRangeSet
        began = time.process_time()
        try:
            getattr(self, kind)(data)
        except refusal:
            self.outcomes[f"{kind} refused"] += 1
        else:
            self.outcomes[f"{kind} accepted"] += 1
        assert time.process_time() - began < CPU_SECONDS

    def meta(self, data: bytes) -> None:
        try:
            expected = Metadata.model_validate_json(data).id
        except (ValidationError, RecursionError):
            expected = META.id
        meta = decode_metadata(data, expected)
        assert decode_metadata(encode_metadata(meta), expected) == meta
        if meta.id == META.id:
            assert (meta.parts, meta.provenance.settings) == (META.parts, META.provenance.settings)

    def serve(self, data: bytes) -> None:
        name = serve_part(0)
        assert _refuses(decode_serve, data, META, 0) or data == PARTS[name]
        meta = META.model_copy(update={"parts": META.parts | {name: hashlib.sha256(data).hexdigest()}})
        assert encode_layer(decode_serve(data, meta, 0), MADE.provenance) == data

    def inspect(self, data: bytes) -> None:
        name = inspect_part(1)
        assert _refuses(decode_inspect, data, META, 1) or data == PARTS[name]
        meta = META.model_copy(update={"parts": META.parts | {name: hashlib.sha256(data).hexdigest()}})
        assert encode_layer(decode_inspect(data, meta, 1), MADE.provenance) == data

    def archive(self, data: bytes) -> None:
        range_set, inspect = decode_archive(data)
        assert assemble(range_set.provenance, range_set.layers, inspect).id == range_set.id
        assert encode_archive(range_set, inspect) == data

    def live(self, data: bytes) -> None:
        self.store.client.set(self.store.keys.live, data)
        state = self.store.read_live_state()
        assert state is not None
        assert LiveState.model_validate_json(state.model_dump_json()) == state
        assert state.active_at(0.0) == state.erasures or state.next_expiry is not None
        assert state.next_generation(None, ()).counter == state.counter + 1

    def keys(self, data: bytes) -> None:
        self.store.client.set(API_KEYS, data)
        keys = self.key_store.read()
        assert keys is not None
        assert ApiKeys.model_validate_json(keys.model_dump_json()) == keys
        assert keys.find_by_token("nl_0123abcd_" + "x" * 43) is None


def _refuses(decode: Callable[[bytes, Metadata, int], object], data: bytes, meta: Metadata, layer: int) -> bool:
    try:
        decode(data, meta, layer)
    except InvalidRangeSet:
        return True
    return False


def fuzz(inputs: int, chosen: int, shrink: bool = True) -> Counter[str]:
    """Try this many inputs with the chosen seed, and count the outcomes.

    Args:
        shrink: after a failure, search for the smallest input that fails.

    Raises:
        BaseException: the failure; Hypothesis adds the input as a note.
    """
    with tempfile.TemporaryDirectory() as folder, connect(None, Path(folder)) as client:
        target = Target(RangeStore(client, "fuzzed"), ApiKeyStore(client))
        for kind, data in VALID.items():
            target(kind, data)
        assert set(target.outcomes) == {f"{kind} accepted" for kind in VALID}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

        @seed(chosen)
        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            phases=Phase if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(damaged())
        def try_one(made: tuple[str, bytes]) -> None:
            target(*made)

        try_one()
        return target.outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="damage encoded data, and check that decoders refuse it")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=5)
    given_ = parser.parse_args()
    json.dump(fuzz(given_.inputs, given_.seed), sys.stdout, indent=1, sort_keys=True)
