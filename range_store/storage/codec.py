"""Parts of a range set as safetensors bytes, and their meta data as JSON: the form in which Redis holds them.

A part's bytes are a function of its arrays, so that equal statistics have equal digests, and a range set one id.
Whatever is wrong with bytes from outside, decoding raises InvalidRangeSet and nothing else.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import ValidationError

from range_store.domain.erasure import FrozenModel, Ranking
from range_store.domain.range_set import (
    Digest,
    InspectLayer,
    Provenance,
    RangeSet,
    ServeLayer,
    content_id,
    field_names,
    statistics_shape,
)
from range_store.errors import InvalidRangeSet

Arrays = Mapping[str, npt.NDArray[Any]]
SALIENCY = "saliency."
"""Saliencies are stored one array per ranking, as `saliency.{ranking}`."""

_DTYPES: dict[str, np.dtype[Any]] = {"F64": np.dtype(np.float64), "U32": np.dtype(np.uint32)}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What safetensors calls the types of arrays."""


class Spec(NamedTuple):
    """What an array must look like."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Meta(FrozenModel):
    """What the store keeps of a range set beside its parts: provenance, and sha256 of every part by name."""

    provenance: Provenance
    parts: dict[str, Digest]

    @property
    def id(self) -> str:
        return content_id(self.provenance, self.parts)


def serve_part(layer: int) -> str:
    """Name of the part that holds a layer's ServeLayer."""
    return f"layer:{layer}:serve"


def inspect_part(layer: int) -> str:
    """Name of the part that holds a layer's InspectLayer."""
    return f"layer:{layer}:inspect"


def part_names(provenance: Provenance) -> tuple[str, ...]:
    """Names of all parts, layer by layer."""
    return tuple(name for layer in provenance.settings.layers for name in (serve_part(layer), inspect_part(layer)))


def serve_specs(provenance: Provenance) -> dict[str, Spec]:
    """Arrays of a serve part by stored name."""
    concepts, hidden, _ = statistics_shape(provenance)
    names = ["mean", "std", *(SALIENCY + ranking for ranking in provenance.settings.rankings)]
    return {name: Spec(_DTYPES["F64"], (concepts, hidden)) for name in names}


def inspect_specs(provenance: Provenance) -> dict[str, Spec]:
    """Arrays of an inspect part by stored name."""
    concepts, hidden, bins = statistics_shape(provenance)
    specs = {name: Spec(_DTYPES["F64"], (concepts, hidden)) for name in field_names(InspectLayer)}
    specs["edges"] = Spec(_DTYPES["F64"], (hidden, bins + 1))
    specs["histogram"] = Spec(_DTYPES["U32"], (concepts, hidden, bins + 2))
    return specs


def serve_arrays(serve: ServeLayer) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `serve` by stored name."""
    saliency = {SALIENCY + ranking: values for ranking, values in serve.saliency.items()}
    return {"mean": serve.mean, "std": serve.std, **saliency}


def inspect_arrays(inspect: InspectLayer) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `inspect` by stored name."""
    return {name: getattr(inspect, name) for name in field_names(InspectLayer)}


def encode_serve(serve: ServeLayer, provenance: Provenance) -> bytes:
    """Raises InvalidRangeSet if the arrays are not what the provenance says."""
    arrays = serve_arrays(serve)
    _check_serve(arrays, provenance)
    return to_safetensors(arrays)


def encode_inspect(inspect: InspectLayer, provenance: Provenance) -> bytes:
    """Raises InvalidRangeSet if the arrays are not what the provenance says."""
    arrays = inspect_arrays(inspect)
    _check_inspect(arrays, provenance)
    return to_safetensors(arrays)


def decode_serve(data: bytes, meta: Meta, layer: int) -> ServeLayer:
    """The serve part of a layer; its arrays are read-only.

    Raises:
        InvalidRangeSet: not the bytes that `meta` names, or not such a part.
    """
    return serve_layer(_checked(data, meta, serve_part(layer)), meta.provenance)


def decode_inspect(data: bytes, meta: Meta, layer: int) -> InspectLayer:
    """The inspect part of a layer; its arrays are read-only.

    Raises:
        InvalidRangeSet: not the bytes that `meta` names, or not such a part.
    """
    return inspect_layer(_checked(data, meta, inspect_part(layer)), meta.provenance)


def serve_layer(arrays: Arrays, provenance: Provenance) -> ServeLayer:
    """Arrays by stored name as a ServeLayer; raises InvalidRangeSet unless they are one."""
    _check_serve(arrays, provenance)
    saliency: dict[Ranking, npt.NDArray[np.float64]]
    saliency = {ranking: arrays[SALIENCY + ranking] for ranking in provenance.settings.rankings}
    return ServeLayer(mean=arrays["mean"], std=arrays["std"], saliency=saliency)


def inspect_layer(arrays: Arrays, provenance: Provenance) -> InspectLayer:
    """Arrays by stored name as an InspectLayer; raises InvalidRangeSet unless they are one."""
    _check_inspect(arrays, provenance)
    return InspectLayer(**{name: arrays[name] for name in field_names(InspectLayer)})


def encode_meta(meta: Meta) -> bytes:
    """Meta data as JSON. Concepts keep their order: it is that of the statistics' first axis."""
    return meta.model_dump_json().encode()


def decode_meta(data: bytes, expected_id: str) -> Meta:
    """Meta data of the range set `expected_id`.

    Raises:
        InvalidRangeSet: not such JSON, part names that do not fit the layers, or another id than the contents give.
    """
    try:
        meta = Meta.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        raise InvalidRangeSet(f"meta data of range set {expected_id} are unreadable: {_first_line(error)}") from None
    check_meta(meta, expected_id)
    return meta


def check_meta(meta: Meta, expected_id: str) -> None:
    """Raises InvalidRangeSet unless the parts fit the provenance and the id is that of the contents."""
    if set(meta.parts) != set(part_names(meta.provenance)):
        raise InvalidRangeSet(f"range set {expected_id} lists parts that do not fit its layers")
    if meta.id != expected_id:
        raise InvalidRangeSet(f"range set {expected_id} has the contents of {meta.id}: it was altered")


def encode_parts(
    provenance: Provenance, serve: Mapping[int, ServeLayer], inspect: Mapping[int, InspectLayer]
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every part, one at a time: a histogram of a large model is large.

    Raises:
        InvalidRangeSet: arrays or layers are not what the provenance says.
    """
    layers = provenance.settings.layers
    for kind, given in (("serve", serve), ("inspect", inspect)):
        if set(given) != set(layers):
            raise InvalidRangeSet(f"{kind} layers {sorted(given)} are not the fitted ones, {list(layers)}")
    for layer in layers:
        try:
            yield serve_part(layer), encode_serve(serve[layer], provenance)
            yield inspect_part(layer), encode_inspect(inspect[layer], provenance)
        except InvalidRangeSet as error:
            raise InvalidRangeSet(f"layer {layer}: {error}") from None


def describe(
    provenance: Provenance, serve: Mapping[int, ServeLayer], inspect: Mapping[int, InspectLayer]
) -> tuple[Meta, dict[str, int]]:
    """Meta data, and the length in bytes of every part by name."""
    digests, lengths = {}, {}
    for name, data in encode_parts(provenance, serve, inspect):
        digests[name], lengths[name] = hashlib.sha256(data).hexdigest(), len(data)
    return Meta(provenance=provenance, parts=digests), lengths


def assemble(provenance: Provenance, serve: Mapping[int, ServeLayer], inspect: Mapping[int, InspectLayer]) -> RangeSet:
    """A range set under the id that its contents give.

    Args:
        serve, inspect: by layer, for every layer of the provenance.

    Raises:
        InvalidRangeSet: arrays or layers are not what the provenance says.
    """
    meta, _ = describe(provenance, serve, inspect)
    return RangeSet(meta.id, provenance, dict(serve))


def to_safetensors(arrays: Arrays, metadata: dict[str, str] | None = None) -> bytes:
    """Arrays of any layout as safetensors bytes; metadata of at most one entry, so that the bytes are determined."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)


def from_safetensors(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Arrays of float64 and uint32, read-only.

    Raises:
        InvalidRangeSet: no such bytes, or arrays of another type.
    """
    try:
        tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise InvalidRangeSet(f"no readable safetensors: {_first_line(error)}") from None
    arrays = {}
    for name, tensor in tensors:
        dtype = _DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise InvalidRangeSet(f"array {name!r} is of type {tensor['dtype']}, not one of {', '.join(_DTYPES)}")
        stored: npt.NDArray[Any] = np.frombuffer(tensor["data"], dtype.newbyteorder("<"))
        try:
            arrays[name] = stored.astype(dtype, copy=False).reshape(tensor["shape"])
        except ValueError as error:
            raise InvalidRangeSet(f"array {name!r}: {error}") from None
        arrays[name].flags.writeable = False
    return arrays


def _checked(data: bytes, meta: Meta, part: str) -> dict[str, npt.NDArray[Any]]:
    digest = hashlib.sha256(data).hexdigest()
    if digest != meta.parts.get(part):
        raise InvalidRangeSet(f"{part} of range set {meta.id} is corrupt: its sha256 does not match")
    arrays = from_safetensors(data)
    if to_safetensors(arrays) != data:  # written anew, the range set would get another id
        raise InvalidRangeSet(f"{part} of range set {meta.id} is not as it is written here")
    return arrays


def _check_serve(arrays: Arrays, provenance: Provenance) -> None:
    _check_specs(arrays, serve_specs(provenance))
    if (arrays["std"] < 0).any():
        raise InvalidRangeSet("'std' holds negative values")
    for ranking in provenance.settings.rankings:
        if np.isnan(arrays[SALIENCY + ranking]).any():
            raise InvalidRangeSet(f"saliency {ranking!r} holds NaN, which cannot be ranked")


def _check_inspect(arrays: Arrays, provenance: Provenance) -> None:
    _check_specs(arrays, inspect_specs(provenance))
    edges = arrays["edges"]
    ascending = (edges[:, 1:] >= edges[:, :-1]).all(axis=1)
    if not (ascending | np.isnan(edges).all(axis=1)).all():
        raise InvalidRangeSet("'edges' do not ascend")


def _check_specs(arrays: Arrays, specs: Mapping[str, Spec]) -> None:
    if set(arrays) != set(specs):
        missing, foreign = sorted(set(specs) - set(arrays)), sorted(set(arrays) - set(specs))
        raise InvalidRangeSet(f"arrays missing: {missing or 'none'}; arrays that do not belong: {foreign or 'none'}")
    for name, spec in specs.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.shape != spec.shape:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InvalidRangeSet(f"array {name!r} is {found}, not {spec.dtype} {spec.shape}")


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]
