"""Reads and writes a range set as one safetensors file, for `neuronlens ranges export` and `import`.

Tensors are named `layer.{l}.serve.{array}` and `layer.{l}.inspect.{array}`. One metadata entry holds the id, the
provenance and the digest of every part as JSON, and the digest of that JSON: the id does not cover library versions
and dates. Reading detects any changed byte.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy.typing as npt
from pydantic import ValidationError

from range_store.atomic_files import atomic_write
from range_store.domain.erasure import FrozenModel
from range_store.domain.range_set import Digest, InspectLayer, RangeSet, ServeLayer
from range_store.errors import InvalidRangeSet
from range_store.storage.codec import (
    DTYPE_NAMES,
    Metadata,
    check_metadata,
    describe,
    encode_metadata,
    from_safetensors,
    inspect_layer,
    layer_arrays,
    serve_layer,
    to_safetensors,
)

ENTRY = "neuronlens.range_set"
"""The file's only metadata entry."""

_LENGTH = struct.Struct("<Q")


class Archive(FrozenModel):
    """The metadata entry. `sha256` is that of the encoded `meta`."""

    id: str
    meta: Metadata
    sha256: Digest


def encode_archive(range_set: RangeSet, inspect: dict[int, InspectLayer]) -> bytes:
    """Encode a range set as the bytes of a file.

    Raises:
        InvalidRangeSet: arrays do not match the provenance, or the id does not match the contents.
    """
    metadata, _ = describe(range_set.provenance, range_set.layers, inspect)
    check_metadata(metadata, range_set.id)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for layer in range_set.provenance.settings.layers:
        for kind, part in (("serve", range_set.layers[layer]), ("inspect", inspect[layer])):
            arrays |= {f"layer.{layer}.{kind}.{name}": array for name, array in layer_arrays(part).items()}
    return to_safetensors(arrays, {ENTRY: _entry(metadata).model_dump_json()})


def decode_archive(data: bytes) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """Decode the bytes of a file. Digests and id are computed again from the arrays.

    Raises:
        InvalidRangeSet: the bytes are not exactly those of an archive.
    """
    archive = _read_entry(data)
    provenance = archive.meta.provenance
    if archive != _entry(archive.meta):
        raise InvalidRangeSet("the file's provenance does not match its sha256 or its id: it was altered")
    arrays = from_safetensors(data)
    if not data.startswith(_header(arrays, archive)):
        raise InvalidRangeSet("the header is not as it was written")
    serve: dict[int, ServeLayer] = {}
    inspect: dict[int, InspectLayer] = {}
    for layer in provenance.settings.layers:
        serve[layer] = serve_layer(_take(arrays, f"layer.{layer}.serve."), provenance)
        inspect[layer] = inspect_layer(_take(arrays, f"layer.{layer}.inspect."), provenance)
    if arrays:
        raise InvalidRangeSet(f"the file holds arrays that do not belong: {', '.join(sorted(arrays)[:3])}")
    metadata, _ = describe(provenance, serve, inspect)
    for name, digest in metadata.parts.items():
        if digest != archive.meta.parts.get(name):
            raise InvalidRangeSet(f"{name} of the file is corrupt: its sha256 does not match")
    check_metadata(archive.meta, archive.id)
    return RangeSet(metadata.id, provenance, serve), inspect


def read_archive(path: Path) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """Read a range set from a file.

    Raises:
        InvalidRangeSet: the file cannot be read, or is not exactly as it was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRangeSet(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return decode_archive(data)
    except InvalidRangeSet as error:
        raise InvalidRangeSet(f"{path} is not a range set: {error}") from None


def write_archive(path: Path, range_set: RangeSet, inspect: dict[int, InspectLayer]) -> None:
    """Write a range set to a file, completely or not at all.

    Raises:
        OSError: the directory is missing, full or not writable; names the file.
    """
    data = encode_archive(range_set, inspect)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _entry(metadata: Metadata) -> Archive:
    return Archive(id=metadata.id, meta=metadata, sha256=hashlib.sha256(encode_metadata(metadata)).hexdigest())


def _read_entry(data: bytes) -> Archive:
    """Read the metadata entry; it must have the exact form that is written, so that no changed byte goes unnoticed."""
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else len(data) + 1
    if len(data) < end:
        raise InvalidRangeSet("the file is truncated, or not in safetensors format")
    try:
        header = json.loads(data[_LENGTH.size : end].decode())
    except (ValueError, RecursionError):
        raise InvalidRangeSet("the header is not valid JSON") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or set(metadata) != {ENTRY}:
        raise InvalidRangeSet(f"it has no metadata {ENTRY!r}: was it written by another program?")
    try:
        archive = Archive.model_validate_json(metadata[ENTRY])
    except (ValidationError, TypeError, RecursionError):
        raise InvalidRangeSet("the provenance in the header is invalid, or from another version") from None
    if archive.model_dump_json() != metadata[ENTRY]:
        raise InvalidRangeSet("the provenance in the header is not as it was written")
    return archive


def _header(arrays: dict[str, npt.NDArray[Any]], archive: Archive) -> bytes:
    """Return the length and header that safetensors writes: wide types first, then by name, without gaps.

    Encoding the arrays again to compare them would need their memory once more.
    """
    header: dict[str, Any] = {"__metadata__": {ENTRY: archive.model_dump_json()}}
    end = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _LENGTH.size)
    return _LENGTH.pack(len(raw)) + raw


def _take(arrays: dict[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """Remove the arrays whose names begin with `prefix`, and return them by the rest of their names."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}
