"""A whole range set as one safetensors file: what `neuronlens ranges export` writes and `import` reads.

Tensors are `layer.{l}.serve.{array}` and `layer.{l}.inspect.{array}`. One metadata entry holds, as JSON, the id, the
provenance and the digest of every part; its own digest stands beside them, because the id leaves out library versions
and dates. Every byte of such a file counts: whatever is changed, reading says so.
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
    Meta,
    check_meta,
    describe,
    encode_meta,
    from_safetensors,
    inspect_arrays,
    inspect_layer,
    serve_arrays,
    serve_layer,
    to_safetensors,
)

ENTRY = "neuronlens.range_set"
"""The file's only metadata entry."""

_LENGTH = struct.Struct("<Q")


class Archive(FrozenModel):
    """The metadata entry. `sha256` covers `meta` as it is stored."""

    id: str
    meta: Meta
    sha256: Digest


def encode_archive(range_set: RangeSet, inspect: dict[int, InspectLayer]) -> bytes:
    """The bytes of the file.

    Raises:
        InvalidRangeSet: arrays are not what the provenance says, or the id is not that of the contents.
    """
    meta, _ = describe(range_set.provenance, range_set.layers, inspect)
    check_meta(meta, range_set.id)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for layer in range_set.provenance.settings.layers:
        parts = {"serve": serve_arrays(range_set.layers[layer]), "inspect": inspect_arrays(inspect[layer])}
        for kind, part in parts.items():
            arrays |= {f"layer.{layer}.{kind}.{name}": array for name, array in part.items()}
    return to_safetensors(arrays, {ENTRY: _entry(meta).model_dump_json()})


def decode_archive(data: bytes) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """The range set in the bytes of a file. Digests and id are computed anew from the arrays.

    Raises:
        InvalidRangeSet: anything at all is wrong.
    """
    archive = _read_entry(data)
    provenance = archive.meta.provenance
    if archive != _entry(archive.meta):
        raise InvalidRangeSet("the file's provenance does not match its sha256 or its id: it was altered")
    arrays = from_safetensors(data)
    if not data.startswith(_head(arrays, archive)):
        raise InvalidRangeSet("the header is not as it was written")
    serve: dict[int, ServeLayer] = {}
    inspect: dict[int, InspectLayer] = {}
    for layer in provenance.settings.layers:
        serve[layer] = serve_layer(_take(arrays, f"layer.{layer}.serve."), provenance)
        inspect[layer] = inspect_layer(_take(arrays, f"layer.{layer}.inspect."), provenance)
    if arrays:
        raise InvalidRangeSet(f"the file holds arrays that do not belong: {', '.join(sorted(arrays)[:3])}")
    meta, _ = describe(provenance, serve, inspect)
    for name, digest in meta.parts.items():
        if digest != archive.meta.parts.get(name):
            raise InvalidRangeSet(f"{name} of the file is corrupt: its sha256 does not match")
    check_meta(archive.meta, archive.id)
    return RangeSet(meta.id, provenance, serve), inspect


def read_archive(path: Path) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """The range set in a file.

    Raises:
        InvalidRangeSet: the file cannot be read, or anything in it is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRangeSet(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return decode_archive(data)
    except InvalidRangeSet as error:
        raise InvalidRangeSet(f"{path} is no range set: {error}") from None


def write_archive(path: Path, range_set: RangeSet, inspect: dict[int, InspectLayer]) -> None:
    """Write the file whole or not at all.

    Raises:
        OSError: the directory is missing, full or not writable; names the file.
    """
    data = encode_archive(range_set, inspect)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _entry(meta: Meta) -> Archive:
    return Archive(id=meta.id, meta=meta, sha256=hashlib.sha256(encode_meta(meta)).hexdigest())


def _read_entry(data: bytes) -> Archive:
    """The metadata entry, which must be as its writer leaves it: else a changed byte could go unseen."""
    if len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        raise InvalidRangeSet("the file is truncated, or no safetensors")
    raw = data[_LENGTH.size : _LENGTH.size + _LENGTH.unpack_from(data)[0]]
    try:
        header = json.loads(raw.decode())
    except (ValueError, RecursionError):
        raise InvalidRangeSet("the header is no JSON") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or set(metadata) != {ENTRY}:
        raise InvalidRangeSet(f"no metadata {ENTRY!r}: written by something else?")
    try:
        archive = Archive.model_validate_json(metadata[ENTRY])
    except (ValidationError, TypeError, RecursionError):
        raise InvalidRangeSet("the provenance in the header is unreadable, or of another version") from None
    if archive.model_dump_json() != metadata[ENTRY]:
        raise InvalidRangeSet("the provenance in the header is not as it was written")
    return archive


def _head(arrays: dict[str, npt.NDArray[Any]], archive: Archive) -> bytes:
    """Length and header of the file, as safetensors writes them: wide types first, then by name, with no gaps."""
    header: dict[str, Any] = {"__metadata__": {ENTRY: archive.model_dump_json()}}
    end = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        start, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _LENGTH.size)
    return _LENGTH.pack(len(raw)) + raw


def _take(arrays: dict[str, npt.NDArray[Any]], prefix: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays whose names begin with `prefix`, without it; they leave `arrays`."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}
