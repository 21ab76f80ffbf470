"""Range sets in Redis: published whole, read with every byte checked, kept while they are new or in use."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import redis

from range_store.domain.range_set import InspectLayer, Provenance, RangeSet
from range_store.errors import InvalidRangeSet, NotFitted, RangeSetInUse, StoreUnavailable, UnknownRangeSet
from range_store.redis_errors import translate_redis_errors
from range_store.storage.archive import read_archive, write_archive
from range_store.storage.codec import (
    Meta,
    check_meta,
    decode_inspect,
    decode_meta,
    decode_serve,
    describe,
    encode_meta,
    encode_parts,
    inspect_part,
    serve_part,
)
from range_store.storage.keys import CHANGES, RANGE_SET, ModelKeys, meta_key, part_key
from range_store.storage.scripts import LIST, PUBLISH, PUT_PART, REMOVE

KEPT = 10
"""Range sets kept per model, newest first; the active one is kept besides."""
UNPUBLISHED_SECONDS = 3600
"""How long parts last whose publisher died before the last step."""
ATTEMPTS = 3
PIECE_BYTES = 256 << 20
"""Longest value of a part: Redis takes 512 MB, and the histograms of many concepts and neurons are larger."""


@dataclass(frozen=True)
class PublishedRangeSet:
    """A published range set. `published_at`: Unix seconds by Redis's clock. `active`: it serves live erasures."""

    id: str
    published_at: float
    active: bool
    provenance: Provenance


class PublishedRangeSets:
    """The range sets of one served model.

    Every method raises StoreUnavailable if Redis cannot be reached or refuses, and may be called from any thread.
    """

    def __init__(self, client: redis.Redis, model: str) -> None:
        self.client = client
        self.model = model
        self.keys = ModelKeys(model)
        self._list = client.register_script(LIST)
        self._put_part = client.register_script(PUT_PART)
        self._publish = client.register_script(PUBLISH)
        self._remove = client.register_script(REMOVE)

    def publish(self, range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> str:
        """Make a range set readable, all of it at once, and give its id. Publishing it again makes it the newest.

        Its parts are written first, and expire by themselves should this process die; one step then makes them last
        and lists the range set. Older ones than the last ten go, except an active one.

        Args:
            inspect: the other part of every layer of the range set.

        Raises:
            InvalidRangeSet: arrays are not what the provenance says, or the id is not that of the contents.
        """
        meta, lengths = describe(range_set.provenance, range_set.layers, inspect)
        check_meta(meta, range_set.id)
        stored_meta = self._stored_meta(meta) or encode_meta(meta)
        pieces = {piece: size for name, length in lengths.items() for piece, size in _pieces(name, length)}
        keys = [self.keys.range_sets, self.keys.live, meta_key(meta.id), *(part_key(meta.id, each) for each in pieces)]
        sizes = [len(stored_meta), *pieces.values()]
        arguments: list[str | int] = [meta.id, self.model, RANGE_SET, KEPT, CHANGES, self.hint(), *sizes]
        with translate_redis_errors():
            for _ in range(ATTEMPTS):
                for name, data in encode_parts(range_set.provenance, range_set.layers, inspect):
                    for number, (piece, size) in enumerate(_pieces(name, len(data))):
                        start = number * PIECE_BYTES
                        value = data[start : start + size]
                        self._put_part([part_key(meta.id, piece)], [value, UNPUBLISHED_SECONDS])
                self._put_part([meta_key(meta.id)], [stored_meta, UNPUBLISHED_SECONDS])
                missing = cast(bytes, self._publish(keys, arguments))
                if not missing:
                    return meta.id
        raise StoreUnavailable(f"{missing.decode()} keeps vanishing from Redis: does it evict keys (maxmemory-policy)?")

    def list(self) -> tuple[PublishedRangeSet, ...]:
        """All published range sets, newest first.

        Raises:
            InvalidRangeSet: one of them is corrupt; names it.
        """
        with translate_redis_errors():
            listed = cast(list[list[bytes]], self._list([self.keys.range_sets], [RANGE_SET]))
        active = self._active_id()
        found = []
        for id_, score, data in ((each.decode(errors="replace"), float(score), data) for each, score, data in listed):
            meta = decode_meta(_present(data or None, id_, "meta"), id_)
            found.append(PublishedRangeSet(id_, score, id_ == active, meta.provenance))
        return tuple(found)

    def ids(self) -> tuple[str, ...]:
        """Ids of all published range sets, oldest first: what `list` would show, without reading it."""
        with translate_redis_errors():
            listed = cast("list[bytes]", self.client.zrange(self.keys.range_sets, 0, -1))
        return tuple(each.decode(errors="replace") for each in listed)

    def provenance(self, id_: str) -> Provenance:
        """Where a range set comes from.

        Raises:
            UnknownRangeSet: none of that id is published.
            InvalidRangeSet: its meta data are corrupt.
        """
        return self._meta(id_).provenance

    def read(self, id_: str) -> RangeSet:
        """A range set, with what masking needs.

        Raises:
            UnknownRangeSet: none of that id is published.
            InvalidRangeSet: something of it is corrupt or lost.
        """
        meta = self._meta(id_)
        layers = meta.provenance.settings.layers
        parts = self._parts(id_, [serve_part(layer) for layer in layers])
        serve = {layer: decode_serve(data, meta, layer) for layer, data in zip(layers, parts, strict=True)}
        return RangeSet(id_, meta.provenance, serve)

    def read_inspect(self, id_: str, layer: int) -> InspectLayer:
        """The rest of the statistics of block `layer`, counted from 0.

        Raises:
            UnknownRangeSet: none of that id is published.
            NotFitted: the fit left that layer out.
            InvalidRangeSet: something of it is corrupt or lost.
        """
        meta = self._meta(id_)
        if layer not in meta.provenance.settings.layers:
            raise NotFitted("layer", [layer], meta.provenance.settings.layers)
        return decode_inspect(self._parts(id_, [inspect_part(layer)])[0], meta, layer)

    def remove(self, id_: str) -> None:
        """Take a range set out.

        Raises:
            UnknownRangeSet: none of that id is published.
            RangeSetInUse: it is active.
        """
        with translate_redis_errors():
            arguments = [id_, self.model, RANGE_SET, CHANGES, self.hint()]
            answer = self._remove([self.keys.range_sets, self.keys.live], arguments)
        if answer == b"unknown":
            raise UnknownRangeSet(id_)
        if answer == b"active":
            raise RangeSetInUse(f"range set {id_} is active: activate another one first")

    def export(self, id_: str, path: Path) -> None:
        """Write a range set to one safetensors file, whole or not at all.

        Raises:
            UnknownRangeSet, InvalidRangeSet: see `read`.
            OSError: the file cannot be written.
        """
        range_set = self.read(id_)
        inspect = {layer: self.read_inspect(id_, layer) for layer in range_set.layers}
        write_archive(path, range_set, inspect)

    def import_file(self, path: Path) -> str:
        """Publish what `export` wrote, and give its id.

        Raises:
            InvalidRangeSet: the file cannot be read, or is corrupt, truncated or something else.
        """
        return self.publish(*read_archive(path))

    def hint(self) -> str:
        """The message that tells readers of this model to read again."""
        return json.dumps({"model": self.model})

    def _meta(self, id_: str) -> Meta:
        return decode_meta(self._parts(id_, ["meta"])[0], id_)

    def _stored_meta(self, meta: Meta) -> bytes | None:
        """Sound meta data of the same contents: date and library versions of the first publication stand."""
        with translate_redis_errors():
            stored = cast(bytes | None, self.client.get(meta_key(meta.id)))
        if stored is not None:
            with suppress(InvalidRangeSet):
                decode_meta(stored, meta.id)
                return stored
        return None

    def _parts(self, id_: str, names: Sequence[str]) -> Sequence[bytes]:
        """Stored bytes by name: what is missing although it is listed is lost, not just removed."""
        first = self._values(id_, names)
        return [self._whole(id_, name, _present(data, id_, name)) for name, data in zip(names, first, strict=True)]

    def _whole(self, id_: str, name: str, first: bytes) -> bytes:
        """A part whose first piece was read."""
        pieces = [first]
        while (
            len(pieces[-1]) == PIECE_BYTES and (more := self._values(id_, [_piece(name, len(pieces))])[0]) is not None
        ):
            pieces.append(more)
        return first if len(pieces) == 1 else b"".join(pieces)

    def _values(self, id_: str, names: Sequence[str]) -> Sequence[bytes | None]:
        """Values by name, in one step. Raises UnknownRangeSet."""
        with translate_redis_errors():
            pipeline = self.client.pipeline(transaction=True)
            pipeline.zscore(self.keys.range_sets, id_)
            for name in names:
                pipeline.get(part_key(id_, name))
            score, *found = pipeline.execute()
        if score is None:
            raise UnknownRangeSet(id_)
        return found

    def _active_id(self) -> str | None:
        raise NotImplementedError


def _piece(name: str, number: int) -> str:
    """What follows the id in the key of a part's piece; the first has the part's own name."""
    return f"{name}:{number}" if number else name


def _pieces(name: str, length: int) -> Iterator[tuple[str, int]]:
    """Name and length of each piece of a part."""
    for number, start in enumerate(range(0, length, PIECE_BYTES)):
        yield _piece(name, number), min(PIECE_BYTES, length - start)


def _present(data: bytes | None, id_: str, name: str) -> bytes:
    if data is None:
        raise InvalidRangeSet(f"range set {id_} has lost its {name}: remove it, or publish it again")
    return data
