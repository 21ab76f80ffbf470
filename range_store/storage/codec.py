"""Encodes the parts of a range set as safetensors, and its metadata as JSON: the form in which Redis holds them.

The bytes of a part depend on its arrays only, so equal statistics have equal digests and a range set has one id.
Decoding checks everything; invalid bytes raise InvalidRangeSet and nothing else.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import ValidationError

from range_store.domain.erasure import FrozenModel, Ranking
from range_store.domain.range_set import Digest, InspectLayer, Provenance, RangeSet, ServeLayer, content_id, field_names
from range_store.errors import InvalidRangeSet

Arrays = Mapping[str, npt.NDArray[Any]]
Layer = ServeLayer | InspectLayer
SALIENCY = "saliency."
"""Prefix of the saliency arrays, one per ranking: `saliency.{ranking}`."""

_DTYPES: dict[str, np.dtype[Any]] = {"F64": np.dtype(np.float64), "U32": np.dtype(np.uint32)}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""The names of array types in safetensors."""


class Metadata(FrozenModel):
    """What the store keeps of a range set beside its parts: the provenance, and the sha256 of every part by name."""

    provenance: Provenance
    parts: dict[str, Digest]

    @property
    def id(self) -> str:
        return content_id(self.provenance, self.parts)


def serve_part(layer: int) -> str:
    """Return the name of the part that holds a layer's ServeLayer."""
    return f"layer:{layer}:serve"


def inspect_part(layer: int) -> str:
    """Return the name of the part that holds a layer's InspectLayer."""
    return f"layer:{layer}:inspect"


def layer_arrays(layer: Layer) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a layer by stored name."""
    if isinstance(layer, InspectLayer):
        return {name: getattr(layer, name) for name in field_names(InspectLayer)}
    saliency = {SALIENCY + ranking: values for ranking, values in layer.saliency.items()}
    return {"mean": layer.mean, "std": layer.std, **saliency}


def serve_layer(arrays: Arrays, provenance: Provenance) -> ServeLayer:
    """Build a ServeLayer from arrays by stored name. Raises InvalidRangeSet if they do not match the provenance."""
    _check_arrays(ServeLayer, arrays, provenance)
    saliency: dict[Ranking, npt.NDArray[np.float64]]
    saliency = {ranking: arrays[SALIENCY + ranking] for ranking in provenance.settings.rankings}
    return ServeLayer(mean=arrays["mean"], std=arrays["std"], saliency=saliency)


def inspect_layer(arrays: Arrays, provenance: Provenance) -> InspectLayer:
    """Build an InspectLayer from arrays by stored name. Raises InvalidRangeSet if they do not match the provenance."""
    _check_arrays(InspectLayer, arrays, provenance)
    return InspectLayer(**{name: arrays[name] for name in field_names(InspectLayer)})


def encode_layer(layer: Layer, provenance: Provenance) -> bytes:
    """Encode one part of a layer. Raises InvalidRangeSet if its arrays do not match the provenance."""
    arrays = layer_arrays(layer)
    _check_arrays(type(layer), arrays, provenance)
    return to_safetensors(arrays)


def decode_serve(data: bytes, metadata: Metadata, layer: int) -> ServeLayer:
    """Decode the serve part of a layer, as read-only arrays.

    Raises:
        InvalidRangeSet: the bytes differ from those that `metadata` describes, or are no such part.
    """
    return serve_layer(_verified(data, metadata, serve_part(layer)), metadata.provenance)


def decode_inspect(data: bytes, metadata: Metadata, layer: int) -> InspectLayer:
    """Decode the inspect part of a layer, as read-only arrays.

    Raises:
        InvalidRangeSet: the bytes differ from those that `metadata` describes, or are no such part.
    """
    return inspect_layer(_verified(data, metadata, inspect_part(layer)), metadata.provenance)


def encode_metadata(metadata: Metadata) -> bytes:
    """Encode metadata as JSON. Concepts keep their order, which is that of the statistics' first axis."""
    return metadata.model_dump_json().encode()


def decode_metadata(data: bytes, expected_id: str) -> Metadata:
    """Decode the metadata of the range set `expected_id`.

    Raises:
        InvalidRangeSet: invalid JSON, part names that do not match the layers, or contents with another id.
    """
    try:
        metadata = Metadata.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise InvalidRangeSet(f"the metadata of range set {expected_id} is unreadable: {_first_line(error)}") from None
    check_metadata(metadata, expected_id)
    return metadata


def check_metadata(metadata: Metadata, expected_id: str) -> None:
    """Raise InvalidRangeSet unless the parts match the provenance and the contents have the id `expected_id`."""
    names = {part(layer) for layer in metadata.provenance.settings.layers for part in (serve_part, inspect_part)}
    if set(metadata.parts) != names:
        raise InvalidRangeSet(f"range set {expected_id} lists parts that do not match its layers")
    if metadata.id != expected_id:
        raise InvalidRangeSet(f"range set {expected_id} has the contents of {metadata.id}: it was altered")


def encode_parts(
    provenance: Provenance, serve: Mapping[int, ServeLayer], inspect: Mapping[int, InspectLayer]
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of every part, one at a time: a histogram of a large model is large.

    Raises:
        InvalidRangeSet: arrays or layers do not match the provenance.
    """
    layers = provenance.settings.layers
    for kind, given in (("serve", serve), ("inspect", inspect)):
        if set(given) != set(layers):
            raise InvalidRangeSet(f"{kind} layers {sorted(given)} differ from the fitted layers {list(layers)}")
    for layer in layers:
        try:
            yield serve_part(layer), encode_layer(serve[layer], provenance)
            yield inspect_part(layer), encode_layer(inspect[layer], provenance)
        except InvalidRangeSet as error:
            raise InvalidRangeSet(f"layer {layer}: {error}") from None


def describe(
    provenance: Provenance, serve: Mapping[int, ServeLayer], inspect: Mapping[int, InspectLayer]
) -> tuple[Metadata, dict[str, int]]:
    """Return the metadata, and the length in bytes of every part by name. Raises as `encode_parts`."""
    digests, lengths = {}, {}
    for name, data in encode_parts(provenance, serve, inspect):
        digests[name], lengths[name] = hashlib.sha256(data).hexdigest(), len(data)
    return Metadata(provenance=provenance, parts=digests), lengths


def assemble(provenance: Provenance, serve: Mapping[int, ServeLayer], inspect: Mapping[int, InspectLayer]) -> RangeSet:
    """Build a range set with the id of its contents.

    Args:
        serve, inspect: by layer, for every layer of the provenance.

    Raises:
        InvalidRangeSet: arrays or layers do not match the provenance.
    """
    metadata, _ = describe(provenance, serve, inspect)
    return RangeSet(metadata.id, provenance, dict(serve))


def to_safetensors(arrays: Arrays, metadata: dict[str, str] | None = None) -> bytes:
    """Encode arrays of any memory layout. The bytes are deterministic with at most one entry of metadata."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


def from_safetensors(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Decode arrays of float64 and uint32, read-only.

    Raises:
        InvalidRangeSet: invalid bytes, or arrays of another type.
    """
    try:
        tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise InvalidRangeSet(f"invalid safetensors: {_first_line(error)}") from None
    arrays = {}
    for name, tensor in tensors:
        dtype = _DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise InvalidRangeSet(f"array {name!r} has type {tensor['dtype']}: expected {' or '.join(_DTYPES)}")
        stored: npt.NDArray[Any] = np.frombuffer(tensor["data"], dtype.newbyteorder("<"))
        try:
            arrays[name] = stored.astype(dtype, copy=False).reshape(tensor["shape"])
        except ValueError as error:
            raise InvalidRangeSet(f"array {name!r}: {error}") from None
        arrays[name].flags.writeable = False
    return arrays


def _verified(data: bytes, metadata: Metadata, part: str) -> dict[str, npt.NDArray[Any]]:
    if hashlib.sha256(data).hexdigest() != metadata.parts.get(part):
        raise InvalidRangeSet(f"{part} of range set {metadata.id} is corrupt: its sha256 does not match")
    arrays = from_safetensors(data)
    if to_safetensors(arrays) != data:  # encoded again, the range set would get another id
        raise InvalidRangeSet(f"{part} of range set {metadata.id} is not in the form that this version writes")
    return arrays


def _check_arrays(kind: type[Layer], arrays: Arrays, provenance: Provenance) -> None:
    """Raise InvalidRangeSet unless the names, types, shapes and values of the arrays are those of such a layer."""
    concepts, hidden, bins = len(provenance.concepts), provenance.model.hidden_size, provenance.settings.bins
    rankings = [SALIENCY + ranking for ranking in provenance.settings.rankings]
    names = field_names(InspectLayer) if kind is InspectLayer else ("mean", "std", *rankings)
    expected: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
    expected = dict.fromkeys(names, (_DTYPES["F64"], (concepts, hidden)))
    if kind is InspectLayer:
        expected["edges"] = _DTYPES["F64"], (hidden, bins + 1)
        expected["histogram"] = _DTYPES["U32"], (concepts, hidden, bins + 2)
    if set(arrays) != set(expected):
        missing, foreign = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
        raise InvalidRangeSet(f"arrays missing: {missing or 'none'}; arrays that do not belong: {foreign or 'none'}")
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InvalidRangeSet(f"array {name!r} is {found}: expected {dtype} {shape}")
    if kind is InspectLayer:
        edges = arrays["edges"]
        ascending = (edges[:, 1:] >= edges[:, :-1]).all(axis=1)
        if not (ascending | np.isnan(edges).all(axis=1)).all():
            raise InvalidRangeSet("'edges' do not ascend")
        return
    if (arrays["std"] < 0).any():
        raise InvalidRangeSet("'std' has negative values")
    for ranking in rankings:
        if np.isnan(arrays[ranking]).any():
            raise InvalidRangeSet(f"{ranking!r} has NaN values, which cannot be ranked")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]
