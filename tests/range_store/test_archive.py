"""A range set as one file: a file with any changed byte is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from range_store.domain.range_set import RangeSet
from range_store.errors import InvalidRangeSet
from range_store.storage.archive import ENTRY, decode_archive, encode_archive, read_archive, write_archive
from range_store.storage.codec import describe, to_safetensors
from tests.range_store.builders import random_range_set

RANGE_SET, INSPECT = random_range_set(
    3, concepts=("Sci/Tech", "Économie", "\u2028\x7f'\"\\"), hidden=3, n_layers=2, bins=2
)
FILE = encode_archive(RANGE_SET, INSPECT)
HEADER = 8 + struct.unpack_from("<Q", FILE)[0]


def test_archive_round_trip_is_exact() -> None:
    range_set, inspect = decode_archive(FILE)
    assert (range_set.id, range_set.provenance) == (RANGE_SET.id, RANGE_SET.provenance)
    assert range_set.concepts == RANGE_SET.concepts
    assert describe(range_set.provenance, range_set.layers, inspect) == describe(
        RANGE_SET.provenance, RANGE_SET.layers, INSPECT
    )
    assert encode_archive(range_set, inspect) == FILE


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=4), st.text(max_size=4))
def test_names_may_hold_any_character(concept: str, name: str) -> None:
    made, inspect = random_range_set(0, concepts=(concept,), hidden=1, n_layers=1, bins=1)
    named = made.provenance.model_copy(update={"model": made.provenance.model.model_copy(update={"id": name})})
    meta, _ = describe(named, made.layers, inspect)
    back, _ = decode_archive(encode_archive(RangeSet(meta.id, named, made.layers), inspect))
    assert back.concepts == (concept,)
    assert back.provenance.model.id == name


@pytest.mark.parametrize("by", [0x01, 0x20, 0x80])  # another digit, another case, no ASCII
def test_changed_byte_of_the_header_is_refused(by: int) -> None:
    for place in range(HEADER):
        with pytest.raises(InvalidRangeSet):
            decode_archive(FILE[:place] + bytes([FILE[place] ^ by]) + FILE[place + 1 :])


def test_header_with_additional_or_reordered_fields_is_refused() -> None:
    header = json.loads(FILE[8:HEADER])
    first, second = list(header)[1:3]
    extended = header | {first: header[first] | {"x": None}}
    reordered = {"__metadata__": header.pop("__metadata__"), second: header.pop(second), **header}
    for changed in (extended, reordered):
        raw = json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with pytest.raises(InvalidRangeSet, match="not as it was written"):
            decode_archive(struct.pack("<Q", len(raw)) + raw + FILE[HEADER:])


@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_changed_byte_is_refused(place: int, by: int) -> None:
    with pytest.raises(InvalidRangeSet):
        decode_archive(FILE[:place] + bytes([FILE[place] ^ by]) + FILE[place + 1 :])


@given(st.integers(0, len(FILE) - 1))
def test_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(InvalidRangeSet):
        decode_archive(FILE[:length])


@given(st.integers(0, len(FILE)), st.binary(min_size=1, max_size=9))
def test_inserted_bytes_are_refused(place: int, inserted: bytes) -> None:
    damaged = FILE[:place] + inserted + FILE[place:]
    if damaged != FILE:
        with pytest.raises(InvalidRangeSet):
            decode_archive(damaged)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for nonsense in (data, struct.pack("<Q", len(data)) + data):
        with pytest.raises(InvalidRangeSet):
            decode_archive(nonsense)


def test_foreign_safetensors_file_is_refused() -> None:
    tensors = {"weight": np.zeros((2, 2))}
    for metadata in (None, {"format": "pt"}, {ENTRY: "{}"}, {ENTRY: "[" * 100_000}):
        with pytest.raises(InvalidRangeSet):
            decode_archive(safetensors.numpy.save(tensors, metadata))


def test_equivalent_header_in_another_notation_is_refused() -> None:
    """Otherwise some changed bytes would be accepted: white space, the order of keys, a key twice."""
    header = json.loads(FILE[8:HEADER])
    entry = header["__metadata__"][ENTRY]
    loose = {**header, "__metadata__": {ENTRY: json.dumps(json.loads(entry))}}
    twice = json.dumps(header, separators=(",", ":"))
    for text in (
        json.dumps(header),
        json.dumps(header, separators=(",", ":"), indent=1),
        json.dumps(loose, separators=(",", ":")),
        twice[:-1] + ',"__metadata__":' + json.dumps(header["__metadata__"], separators=(",", ":")) + "}",
        FILE[8:HEADER].decode().rstrip() + "\n" * 8,
        FILE[8:HEADER].decode() + " " * 8,
    ):
        padded = text.encode() + b" " * (-len(text.encode()) % 8)
        with pytest.raises(InvalidRangeSet):
            decode_archive(struct.pack("<Q", len(padded)) + padded + FILE[HEADER:])


def test_unknown_or_missing_arrays_are_refused() -> None:
    from range_store.storage.archive import _read_entry

    entry = {ENTRY: _read_entry(FILE).model_dump_json()}
    tensors = safetensors.numpy.load(FILE)
    assert decode_archive(to_safetensors(tensors, entry))[0].id == RANGE_SET.id
    with pytest.raises(InvalidRangeSet, match=r"do not belong: layer\.9\.x"):
        decode_archive(to_safetensors({**tensors, "layer.9.x": np.zeros(1)}, entry))
    del tensors["layer.1.serve.mean"]
    with pytest.raises(InvalidRangeSet, match=r"missing.*mean"):
        decode_archive(to_safetensors(tensors, entry))


def test_range_set_with_a_wrong_id_is_not_written() -> None:
    with pytest.raises(InvalidRangeSet, match="altered"):
        encode_archive(RangeSet("0" * 20, RANGE_SET.provenance, RANGE_SET.layers), INSPECT)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ranges.safetensors"
    write_archive(path, RANGE_SET, INSPECT)
    assert path.read_bytes() == FILE
    with pytest.raises(InvalidRangeSet):
        write_archive(path, RangeSet("0" * 20, RANGE_SET.provenance, RANGE_SET.layers), INSPECT)
    with pytest.raises(OSError, match="directory"):
        write_archive(tmp_path / "absent" / "ranges.safetensors", RANGE_SET, INSPECT)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_archive(tmp_path / "taken", RANGE_SET, INSPECT)
    assert path.read_bytes() == FILE
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ranges.safetensors", "taken"]


def test_error_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(InvalidRangeSet, match=str(path)):
            read_archive(path)
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidRangeSet, match=r"empty is not a range set: .*truncated"):
        read_archive(tmp_path / "empty")
