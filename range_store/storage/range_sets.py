"""Range sets in Redis: published atomically, verified when read, and kept while they are recent or active."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import redis

from range_store.domain.range_set import InspectLayer, Provenance, RangeSet
from range_store.errors import InvalidRangeSet, NotFitted, RangeSetInUse, StoreUnavailable, UnknownRangeSet
from range_store.redis_errors import translate_redis_errors
from range_store.storage.archive import write_archive
from range_store.storage.codec import (
    Metadata,
    check_metadata,
    decode_inspect,
    decode_metadata,
    decode_serve,
    describe,
    encode_metadata,
    encode_parts,
    inspect_part,
    serve_part,
)
from range_store.storage.schema import (
    CHANGES,
    LIST,
    PUBLISH,
    PUT_PART,
    RANGE_SET,
    REMOVE,
    ModelKeys,
    metadata_key,
    part_key,
)

KEPT = 10
"""Range sets kept per model, newest first; the active one is kept in addition."""
UNPUBLISHED_SECONDS = 3600
"""Time until parts expire whose publisher died before the last step."""
ATTEMPTS = 3
PIECE_BYTES = 256 << 20
"""Longest value of a part. Redis allows 512 MB; histograms of many concepts and neurons are larger."""


@dataclass(frozen=True)
class PublishedRangeSet:
    """A published range set. `published_at`: Unix seconds by Redis's clock. `active`: live erasures resolve on it."""

    id: str
    published_at: float
    active: bool
    provenance: Provenance


class PublishedRangeSets:
    """The range sets of one served model; safe to use from any thread.

    Every method raises StoreUnavailable if Redis cannot be reached or refuses.

    Args:
        active_id: returns the id of the active range set.
    """

    def __init__(self, client: redis.Redis, model: str, active_id: Callable[[], str | None]) -> None:
        self._client = client
        self._model = model
        self._keys = ModelKeys(model)
        self._active_id = active_id
        self._list = client.register_script(LIST)
        self._put_part = client.register_script(PUT_PART)
        self._publish = client.register_script(PUBLISH)
        self._remove = client.register_script(REMOVE)

    def publish(self, range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> str:
        """Publish a range set atomically, and return its id. Publishing it again makes it the newest.

        The parts are written first and expire if this process dies; one last step makes them permanent and lists the
        range set. That step also removes all but the ten newest range sets and the active one.

        Args:
            inspect: the InspectLayer of every layer of the range set.

        Raises:
            InvalidRangeSet: the arrays do not match the provenance, or the id does not match the contents.
        """
        metadata, lengths = describe(range_set.provenance, range_set.layers, inspect)
        check_metadata(metadata, range_set.id)
        id_, stored_metadata = metadata.id, self._stored_metadata(metadata) or encode_metadata(metadata)
        pieces = {piece: size for name, length in lengths.items() for piece, size in _pieces(name, length)}
        keys = [self._keys.range_sets, self._keys.live, metadata_key(id_), *(part_key(id_, each) for each in pieces)]
        sizes = [len(stored_metadata), *pieces.values()]
        arguments: list[str | int] = [id_, self._model, RANGE_SET, KEPT, CHANGES, self._keys.hint, *sizes]
        with translate_redis_errors():
            for _ in range(ATTEMPTS):
                for name, data in encode_parts(range_set.provenance, range_set.layers, inspect):
                    for number, (piece, size) in enumerate(_pieces(name, len(data))):
                        start = number * PIECE_BYTES
                        value = data[start : start + size]
                        self._put_part([part_key(id_, piece)], [value, UNPUBLISHED_SECONDS])
                self._put_part([metadata_key(id_)], [stored_metadata, UNPUBLISHED_SECONDS])
                missing = cast(bytes, self._publish(keys, arguments))
                if not missing:
                    return id_
        raise StoreUnavailable(
            f"{missing.decode()} vanishes from Redis while the range set is written: "
            "set its maxmemory-policy to noeviction"
        )

    def list(self) -> tuple[PublishedRangeSet, ...]:
        """Return all published range sets, newest first.

        Raises:
            InvalidRangeSet: one of them is corrupt; the message names it.
        """
        with translate_redis_errors():
            listed = cast(list[list[bytes]], self._list([self._keys.range_sets], [RANGE_SET]))
        active = self._active_id()
        found = []
        for raw_id, score, data in listed:
            id_ = raw_id.decode(errors="replace")
            metadata = decode_metadata(_present(data or None, id_, "meta"), id_)
            found.append(PublishedRangeSet(id_, float(score), id_ == active, metadata.provenance))
        return tuple(found)

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all published range sets, oldest first, without reading the range sets."""
        with translate_redis_errors():
            listed = cast("list[bytes]", self._client.zrange(self._keys.range_sets, 0, -1))
        return tuple(each.decode(errors="replace") for each in listed)

    def provenance(self, id_: str) -> Provenance:
        """Return the provenance of a range set.

        Raises:
            UnknownRangeSet: no range set with that id is published.
            InvalidRangeSet: its metadata is corrupt.
        """
        return self._metadata(id_).provenance

    def read(self, id_: str) -> RangeSet:
        """Read the part of a range set that masking needs.

        Raises:
            UnknownRangeSet: no range set with that id is published.
            InvalidRangeSet: a part of it is corrupt or lost.
        """
        metadata = self._metadata(id_)
        layers = metadata.provenance.settings.layers
        parts = self._parts(id_, [serve_part(layer) for layer in layers])
        serve = {layer: decode_serve(data, metadata, layer) for layer, data in zip(layers, parts, strict=True)}
        return RangeSet(id_, metadata.provenance, serve)

    def read_inspect(self, id_: str, layer: int) -> InspectLayer:
        """Read the other statistics of block `layer`, counted from 0.

        Raises:
            UnknownRangeSet: no range set with that id is published.
            NotFitted: the layer was not fitted.
            InvalidRangeSet: a part of it is corrupt or lost.
        """
        metadata = self._metadata(id_)
        if layer not in metadata.provenance.settings.layers:
            raise NotFitted("layer", [layer], metadata.provenance.settings.layers)
        return decode_inspect(self._parts(id_, [inspect_part(layer)])[0], metadata, layer)

    def remove(self, id_: str) -> None:
        """Remove a range set.

        Raises:
            UnknownRangeSet: no range set with that id is published.
            RangeSetInUse: it is active.
        """
        with translate_redis_errors():
            arguments = [id_, self._model, RANGE_SET, CHANGES, self._keys.hint]
            answer = self._remove([self._keys.range_sets, self._keys.live], arguments)
        if answer == b"unknown":
            raise UnknownRangeSet(id_)
        if answer == b"active":
            raise RangeSetInUse(f"range set {id_} is active: activate another one first")

    def export_file(self, id_: str, path: Path) -> None:
        """Write a range set to one safetensors file, completely or not at all.

        Raises:
            UnknownRangeSet, InvalidRangeSet: see `read`.
            OSError: the file cannot be written.
        """
        range_set = self.read(id_)
        inspect = {layer: self.read_inspect(id_, layer) for layer in range_set.layers}
        write_archive(path, range_set, inspect)

    def _metadata(self, id_: str) -> Metadata:
        return decode_metadata(self._parts(id_, ["meta"])[0], id_)

    def _stored_metadata(self, metadata: Metadata) -> bytes | None:
        """Return the stored metadata if valid, so that a republished range set keeps its first date and versions."""
        with translate_redis_errors():
            stored = cast(bytes | None, self._client.get(metadata_key(metadata.id)))
        if stored is not None:
            with suppress(InvalidRangeSet):
                decode_metadata(stored, metadata.id)
                return stored
        return None

    def _parts(self, id_: str, names: Sequence[str]) -> Sequence[bytes]:
        """Return the bytes of parts by name. A missing part of a listed range set is lost, not just removed."""
        parts = []
        for name, first in zip(names, self._values(id_, names), strict=True):
            pieces = [_present(first, id_, name)]
            while len(pieces[-1]) == PIECE_BYTES:
                (more,) = self._values(id_, [_piece(name, len(pieces))])
                if more is None:
                    break
                pieces.append(more)
            parts.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return parts

    def _values(self, id_: str, names: Sequence[str]) -> Sequence[bytes | None]:
        """Read values by name in one transaction. Raises UnknownRangeSet."""
        with translate_redis_errors():
            pipeline = self._client.pipeline(transaction=True)
            pipeline.zscore(self._keys.range_sets, id_)
            for name in names:
                pipeline.get(part_key(id_, name))
            score, *found = pipeline.execute()
        if score is None:
            raise UnknownRangeSet(id_)
        return found


def _piece(name: str, number: int) -> str:
    """Return the name of a part's piece; the first piece has the name of the part."""
    return f"{name}:{number}" if number else name


def _pieces(name: str, length: int) -> Iterator[tuple[str, int]]:
    """Yield the name and the length of each piece of a part."""
    for number, start in enumerate(range(0, length, PIECE_BYTES)):
        yield _piece(name, number), min(PIECE_BYTES, length - start)


def _present(data: bytes | None, id_: str, name: str) -> bytes:
    if data is None:
        raise InvalidRangeSet(f"range set {id_} has lost its part {name!r}: publish it again, or remove it")
    return data
