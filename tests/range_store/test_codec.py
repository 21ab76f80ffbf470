"""Parts of range sets as bytes: decoding restores every bit, and wrong bytes are refused."""

import dataclasses
import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from range_store.domain.range_set import InspectLayer, Provenance, RangeSet, ServeLayer, content_id, field_names
from range_store.errors import InvalidRangeSet
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
    to_safetensors,
)
from tests.range_store.builders import random_layer, random_provenance, random_range_set

RANGE_SET, INSPECT = random_range_set(0)
PROVENANCE = RANGE_SET.provenance
META, _ = describe(PROVENANCE, RANGE_SET.layers, INSPECT)
PARTS = dict(encode_parts(PROVENANCE, RANGE_SET.layers, INSPECT))
FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
NUMBERS = st.floats(allow_nan=False, allow_infinity=True, width=64)


def meta_of(provenance: Provenance, parts: dict[str, bytes]) -> Metadata:
    """Metadata data with the right checksums of `parts`, whatever those contain."""
    return Metadata(
        provenance=provenance, parts={name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    )


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@st.composite
def layers(draw: st.DrawFn) -> tuple[Provenance, ServeLayer, InspectLayer]:
    """Any arrays that the stored form allows: NaN and infinite statistics, −0.0, −∞ saliencies, one-sided edges."""
    concepts = draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True))
    c, d, b = len(concepts), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    provenance = random_provenance(1, concepts, hidden=d, n_layers=1, bins=b)
    statistic = arrays(np.float64, (c, d), elements=FLOATS)
    serve = ServeLayer(
        mean=draw(statistic),
        std=np.abs(draw(statistic)),
        saliency={each: draw(arrays(np.float64, (c, d), elements=NUMBERS)) for each in provenance.settings.rankings},
    )
    edges = np.sort(draw(arrays(np.float64, (d, b + 1), elements=NUMBERS)), axis=1)
    edges[draw(arrays(np.bool_, d))] = np.nan
    histogram = draw(arrays(np.uint32, (c, d, b + 2)))
    inspect = InspectLayer(*(draw(statistic) for _ in range(5)), edges=edges, histogram=histogram)
    return provenance, serve, inspect


@settings(max_examples=50)
@given(layers())
def test_round_trip_keeps_every_bit(layer: tuple[Provenance, ServeLayer, InspectLayer]) -> None:
    provenance, serve, inspect = layer
    range_set = assemble(provenance, {0: serve}, {0: inspect})
    parts = dict(encode_parts(provenance, {0: serve}, {0: inspect}))
    meta = decode_metadata(encode_metadata(describe(provenance, {0: serve}, {0: inspect})[0]), range_set.id)
    assert meta.provenance == provenance
    assert meta.provenance.concepts == provenance.concepts, "statistics are stored in the order of the concepts"
    back = decode_serve(parts[serve_part(0)], meta, 0)
    assert same_bits(back.mean, serve.mean)
    assert same_bits(back.std, serve.std)
    assert all(same_bits(back.saliency[ranking], values) for ranking, values in serve.saliency.items())
    rest = decode_inspect(parts[inspect_part(0)], meta, 0)
    assert all(same_bits(getattr(rest, name), getattr(inspect, name)) for name in field_names(InspectLayer))


@given(st.sampled_from(sorted(PARTS)), st.data())
def test_damaged_part_is_refused(name: str, data: st.DataObject) -> None:
    part = PARTS[name]
    if data.draw(st.booleans()):
        damaged = part[: data.draw(st.integers(0, len(part) - 1))]
    else:
        place = data.draw(st.integers(0, len(part) - 1))
        damaged = part[:place] + bytes([part[place] ^ data.draw(st.integers(1, 255))]) + part[place + 1 :]
    decode = decode_serve if name.endswith("serve") else decode_inspect
    with pytest.raises(InvalidRangeSet, match="corrupt"):
        decode(damaged, META, int(name.split(":")[1]))


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda b: struct.pack("<Q", len(b)) + b)))
def test_nonsense_with_the_right_checksum_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRangeSet):
        decode_serve(data, meta_of(PROVENANCE, {serve_part(0): data}), 0)


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        '{"mean":' * 50_000,
        json.dumps({"mean": {"dtype": "F64", "shape": [2**62, 4], "data_offsets": [0, 8]}}),
        json.dumps({"mean": {"dtype": "F64", "shape": [2**64, 2**64], "data_offsets": [0, 8]}}),
        json.dumps({"mean": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}),
        json.dumps({"mean": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}}),
        json.dumps({"mean": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}),
        json.dumps({"mean": {"dtype": "F64", "shape": [1] * 100, "data_offsets": [0, 8]}}),
    ],
    ids=["nested list", "nested object", "overflow", "beyond 64 bits", "negative", "backwards", "bf16", "100 axes"],
)
def test_hostile_header_is_refused(header: str) -> None:
    data = struct.pack("<Q", len(header)) + header.encode() + bytes(8)
    with pytest.raises(InvalidRangeSet):
        decode_serve(data, meta_of(PROVENANCE, {serve_part(0): data}), 0)


def test_header_longer_than_the_data_is_refused() -> None:
    for data in (b"", b"\0" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 10**12) + b"{}"):
        with pytest.raises(InvalidRangeSet):
            decode_serve(data, meta_of(PROVENANCE, {serve_part(0): data}), 0)


def changed(serve: ServeLayer, **arrays_: Any) -> ServeLayer:
    return dataclasses.replace(serve, **arrays_)


SERVE = RANGE_SET.layers[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changed(SERVE, mean=SERVE.mean.astype(np.float32)), "float32"),
        (changed(SERVE, mean=SERVE.mean[:, :-1]), "'mean'"),
        (changed(SERVE, mean=SERVE.mean.T), "'mean'"),
        (changed(SERVE, mean=SERVE.mean.tolist()), "'mean' is list"),
        (changed(SERVE, std=-1 - SERVE.std), "negative"),
        (changed(SERVE, saliency={"max": SERVE.saliency["max"]}), "missing.*probeless"),
        (changed(SERVE, saliency={**SERVE.saliency, "probe": SERVE.mean}), "not belong.*saliency.probe"),
        (changed(SERVE, saliency={**SERVE.saliency, "max": SERVE.mean * np.nan}), "NaN"),
    ],
)
def test_arrays_that_contradict_the_provenance_are_neither_written_nor_read(wrong: Any, message: str) -> None:
    with pytest.raises(InvalidRangeSet, match=message):
        encode_layer(wrong, PROVENANCE)
    stored = {"mean": wrong.mean, "std": wrong.std, **{f"saliency.{k}": v for k, v in wrong.saliency.items()}}
    if all(isinstance(array, np.ndarray) for array in stored.values()):
        data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in stored.items()})
        with pytest.raises(InvalidRangeSet):
            decode_serve(data, meta_of(PROVENANCE, {serve_part(0): data}), 0)


def test_edges_must_ascend_or_be_absent() -> None:
    inspect = INSPECT[0]
    unknown = inspect.edges.copy()
    unknown[0] = np.nan
    encode_layer(dataclasses.replace(inspect, edges=unknown), PROVENANCE)
    unknown[0, 0] = 0.0
    for wrong in (inspect.edges[:, ::-1], unknown):
        with pytest.raises(InvalidRangeSet, match="ascend"):
            encode_layer(dataclasses.replace(inspect, edges=wrong), PROVENANCE)


def test_part_in_the_place_of_another_is_refused() -> None:
    swapped = meta_of(PROVENANCE, {serve_part(0): PARTS[inspect_part(0)]})
    with pytest.raises(InvalidRangeSet, match="do not belong"):
        decode_serve(PARTS[inspect_part(0)], swapped, 0)
    with pytest.raises(InvalidRangeSet, match="corrupt"):
        decode_serve(PARTS[serve_part(1)], META, 0)


def test_equivalent_part_in_another_notation_is_refused() -> None:
    """Otherwise a range set would have another id once it is written again."""
    part = PARTS[serve_part(0)]
    length = struct.unpack_from("<Q", part)[0]
    header = json.dumps(json.loads(part[8 : 8 + length])).encode()  # the same with white space
    loose = struct.pack("<Q", len(header)) + header + part[8 + length :]
    with pytest.raises(InvalidRangeSet, match="not in the form"):
        decode_serve(loose, meta_of(PROVENANCE, {serve_part(0): loose}), 0)


def test_metadata_that_does_not_match_the_id_are_refused() -> None:
    stored = encode_metadata(META)
    assert decode_metadata(stored, RANGE_SET.id) == META
    with pytest.raises(InvalidRangeSet, match="altered"):
        decode_metadata(stored, "0" * 20)
    with pytest.raises(InvalidRangeSet, match="altered"):
        decode_metadata(stored.replace(b'"float32"', b'"float16"'), RANGE_SET.id)
    with pytest.raises(InvalidRangeSet, match="do not match its layers"):
        decode_metadata(stored.replace(b"layer:2:serve", b"layer:7:serve"), RANGE_SET.id)
    with pytest.raises(InvalidRangeSet, match="unreadable"):
        decode_metadata(stored.replace(b'"format":1', b'"format":2'), RANGE_SET.id)


@given(st.integers(0, len(encode_metadata(META)) - 1), st.integers(1, 255))
def test_changed_byte_of_meta_data_is_refused_or_outside_the_identity(place: int, by: int) -> None:
    stored = encode_metadata(META)
    try:
        back = decode_metadata(stored[:place] + bytes([stored[place] ^ by]) + stored[place + 1 :], RANGE_SET.id)
    except InvalidRangeSet:
        return
    unnamed: Any = {"versions": True, "created_at": True, "corpus": {"selection", "empty", "odd"}}
    assert back.parts == META.parts
    assert back.provenance.model_dump(exclude=unnamed) == PROVENANCE.model_dump(exclude=unnamed)


@given(st.binary(max_size=100))
def test_arbitrary_bytes_as_meta_data_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRangeSet):
        decode_metadata(data, RANGE_SET.id)


def test_id_depends_on_the_numbers_and_not_on_the_time() -> None:
    again, inspect = random_range_set(0)
    assert again.id == RANGE_SET.id
    later = PROVENANCE.model_copy(update={"created_at": 1.0, "versions": {"numpy": "0"}})
    assert assemble(later, again.layers, inspect).id == RANGE_SET.id
    other = PROVENANCE.model_copy(update={"settings": PROVENANCE.settings.model_copy(update={"dtype": "bfloat16"})})
    assert assemble(other, again.layers, inspect).id != RANGE_SET.id
    nudged = dataclasses.replace(INSPECT[2], m4=np.nextafter(INSPECT[2].m4, np.inf))
    assert assemble(PROVENANCE, RANGE_SET.layers, {**INSPECT, 2: nudged}).id != RANGE_SET.id


def test_order_of_concepts_is_part_of_the_id() -> None:
    backwards = dict(reversed(PROVENANCE.corpus.counts.items()))
    other = PROVENANCE.model_copy(update={"corpus": PROVENANCE.corpus.model_copy(update={"counts": backwards})})
    assert other == PROVENANCE, "Python compares them as equal"
    assert content_id(other, META.parts) != content_id(PROVENANCE, META.parts)


def test_layers_must_be_those_of_the_provenance() -> None:
    serve, inspect = random_layer(5, PROVENANCE)
    with pytest.raises(InvalidRangeSet, match="layers"):
        assemble(PROVENANCE, {0: serve}, {0: inspect})
    with pytest.raises(InvalidRangeSet, match="layers"):
        assemble(PROVENANCE, RANGE_SET.layers, {**INSPECT, 7: inspect})
    with pytest.raises(InvalidRangeSet, match="layer 1: "):
        assemble(PROVENANCE, {**RANGE_SET.layers, 1: dataclasses.replace(serve, std=-serve.std - 1)}, INSPECT)


def test_memory_layout_does_not_change_the_id() -> None:
    fortran = {layer: changed(serve, mean=np.asfortranarray(serve.mean)) for layer, serve in RANGE_SET.layers.items()}
    assert assemble(PROVENANCE, fortran, INSPECT).id == RANGE_SET.id


def test_decoded_arrays_are_read_only() -> None:
    serve = decode_serve(PARTS[serve_part(0)], META, 0)
    with pytest.raises(ValueError, match="read-only"):
        serve.mean[0, 0] = 0.0


def test_equal_arrays_give_equal_bytes() -> None:
    assert to_safetensors({"b": np.zeros(2), "a": np.ones(3)}) == to_safetensors({"a": np.ones(3), "b": np.zeros(2)})
    assert isinstance(RANGE_SET, RangeSet)
