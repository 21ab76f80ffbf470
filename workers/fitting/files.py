"""Files of labelled texts: which can be read, and a text and a label of each row. No type is guessed: NA is a text."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from workers.fitting.errors import CorpusError

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
READABLE = ".jsonl, .csv, .tsv or .parquet (all but .parquet also with .gz, .bz2 or .xz behind it)"
TABLE_ROWS = 4096
SCHEMA = pa.schema([("text", pa.large_binary()), ("label", pa.large_string())])
"""How texts and labels are kept: UTF-8 with lone surrogates, null where there is no text; and JSON."""

_FIRST_ROWS = 1024
"""Rows of a file that tell its columns, where rows need not have the same."""
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "validation"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
csv.field_size_limit(sys.maxsize)  # texts may be long


def kind_of(path: str) -> str | None:
    """How a file is read, by its name; None: not at all."""
    plain, compressed = _without_compression(path)
    kind = KINDS.get(PurePath(plain).suffix.lower())
    return None if compressed and kind == "parquet" else kind


def is_remote(source: str) -> bool:
    """Whether it is an address, and not a path of this machine."""
    return "://" in source and not source.startswith("file://")


def is_saved(source: str) -> bool:
    """Whether it is a directory that the `datasets` library saved a data set in."""
    return any(Path(source, name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def is_hub(source: str) -> bool:
    """Whether it is no file, but may be the name of a data set on the hub."""
    return kind_of(source) is None and _HUB_NAME.fullmatch(source) is not None and not Path(source).exists()


def without_password(source: str) -> str:
    """An address, less what may stand before its host."""
    return re.sub(r"://[^/@]*@", "://", source)


def reason_of(error: BaseException) -> str:
    """The first line of what began it: libraries raise whatever their parsers do."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def files_of(source: str) -> tuple[str, ...]:
    """The files of a path, directory, pattern or address, by name. A path that exists is no pattern.

    Raises:
        CorpusError: there are none, of a kind that cannot be read, or of several splits.
    """
    place = without_password(source)
    below = ""
    try:
        system, path = _system(source)
        if system.isdir(path):
            below = path
            found = [name for name in system.find(path) if kind_of(name) and not _hidden(name, below)]
            if not found:
                raise CorpusError(f"{place} holds no files that can be read: {READABLE}")
        elif system.exists(path):
            found = [path]
        elif any(character in path for character in "*?["):
            found = [name for name in system.glob(path) if system.isfile(name)]
        else:
            found = []
    except CorpusError:
        raise
    except Exception as error:  # of whatever serves such addresses
        raise CorpusError(f"cannot look up {place}: {reason_of(error)}") from error
    if not found:
        raise CorpusError(f"no such file: {place}")
    if unknown := [name for name in found if kind_of(name) is None]:
        raise CorpusError(f"{PurePath(unknown[0]).name}: unknown kind of file; use {READABLE}")
    splits = {split: name for name in sorted(found, reverse=True) if (split := _split_of(name, below))}
    if below and len(splits) > 1:
        names = " and ".join(PurePath(name).name for name in sorted(splits.values()))
        raise CorpusError(f"{place} holds several splits, such as {names}: name the files of one of them")
    if not is_remote(source):
        return tuple(sorted(found))
    return (source,) if found == [path] else tuple(sorted(system.unstrip_protocol(name) for name in found))


def columns_of(paths: Sequence[str]) -> tuple[tuple[str, ...], dict[str, list[str]]] | None:
    """Columns of the first file with any rows, and the names of class numbers where it has them; None: no rows.

    Raises:
        CorpusError: it cannot be read.
    """
    for path in paths:
        with _opened(path) as file:
            if kind_of(path) == "parquet":
                parquet = pq.ParquetFile(file)
                if parquet.metadata.num_rows:
                    return tuple(parquet.schema_arrow.names), _class_names(parquet.schema_arrow)
                continue
            rows = list(islice(_rows(file, path), _FIRST_ROWS))
            if rows:
                return tuple(dict.fromkeys(name for row in rows for name in row)), {}
    return None


def tables(path: str, text_field: str, label_field: str) -> Iterator[pa.Table]:
    """Texts and labels of a file in its order, as tables of `SCHEMA`. A row without such a column has none.

    Raises:
        CorpusError: it cannot be read; names the file, and the row where there is one.
    """
    rows = _texts_and_labels(path, text_field, label_field)
    while part := list(islice(rows, TABLE_ROWS)):
        texts = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None for text, _ in part]
        labels = [json.dumps(label if isinstance(label, (str, int)) else None) for _, label in part]
        yield pa.table([texts, labels], schema=SCHEMA)


def texts_of(table: pa.Table) -> list[str | None]:
    """The texts of a table of `SCHEMA`."""
    values = table.column("text").to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogatepass") for value in values]


def labels_of(table: pa.Table) -> list[Any]:
    """The labels of a table of `SCHEMA`."""
    return [_label(value) for value in table.column("label").to_pylist()]


@lru_cache(maxsize=4096)
def _label(written: str) -> Any:
    return json.loads(written)


def _without_compression(path: str) -> tuple[str, str | None]:
    suffix = PurePath(path).suffix.lower()
    return (path[: -len(suffix)], COMPRESSED[suffix]) if suffix in COMPRESSED else (path, None)


def _system(source: str) -> tuple[Any, str]:
    """The file system of a path or address, and the path there. Characters of a local path mean themselves."""
    if is_remote(source):
        system, path = fsspec.core.url_to_fs(source)
        return system, path
    return LocalFileSystem(), LocalFileSystem._strip_protocol(source)


def _hidden(path: str, directory: str) -> bool:
    return any(part.startswith(".") for part in PurePath(path.removeprefix(directory)).parts)


def _split_of(path: str, directory: str) -> str | None:
    words = re.split("[^a-z]+", path.removeprefix(directory).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The bytes of a file. Whatever fails while it is read becomes a CorpusError that names it."""
    try:
        system, inside = _system(path)
        with system.open(inside, "rb", compression=_without_compression(path)[1]) as file:
            yield file
    except CorpusError:
        raise
    except Exception as error:  # of whatever serves such addresses, and of decompression
        raise CorpusError(f"cannot read {PurePath(path).name}: {reason_of(error)}") from error


def _texts_and_labels(path: str, text_field: str, label_field: str) -> Iterator[tuple[Any, Any]]:
    name = PurePath(path).name
    with _opened(path) as file:
        if kind_of(path) != "parquet":
            for row in _rows(file, path):
                yield row.get(text_field), row.get(label_field)
            return
        parquet = pq.ParquetFile(file)
        fields = [field for field in (text_field, label_field) if field in parquet.schema_arrow.names]
        first = 0
        for batch in parquet.iter_batches(TABLE_ROWS, columns=list(dict.fromkeys(fields))):
            try:
                columns = {field: batch.column(field).to_pylist() for field in fields}
            except UnicodeDecodeError:
                raise CorpusError(f"{name}: a row after row {first} is not UTF-8") from None
            nothing = [None] * batch.num_rows
            yield from zip(columns.get(text_field, nothing), columns.get(label_field, nothing), strict=True)
            first += batch.num_rows


def _rows(file: Any, path: str) -> Iterator[dict[str, Any]]:
    """Rows of a text file. Raises CorpusError naming the row."""
    kind, name = kind_of(path), PurePath(path).name
    return _json_rows(file, name) if kind == "json" else _csv_rows(file, name, "\t" if kind == "tsv" else ",")


def _json_rows(file: Any, name: str) -> Iterator[dict[str, Any]]:
    row = 0
    lines = io.BufferedReader(file)  # a streamed address has no lines of its own
    for raw in lines:
        line = raw.removeprefix(b"\xef\xbb\xbf").strip() if not row else raw.strip()
        if not line:
            continue
        row += 1
        if row == 1 and line.startswith(b"["):  # one array of all rows
            for row, value in enumerate(_parsed(line + b"".join(lines), f"{name}: the array"), 1):
                yield _object(value, name, row)
            return
        yield _object(_parsed(line, f"{name}: row {row}"), name, row)


def _parsed(written: bytes, place: str) -> Any:
    try:
        return json.loads(written.decode())
    except UnicodeDecodeError:
        raise CorpusError(f"{place} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise CorpusError(f"cannot read {place} is not JSON ({why}); one object is expected per line") from None


def _object(value: Any, name: str, row: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorpusError(f'{name}: row {row} is not an object such as {{"text": "…", "label": "…"}}')
    return value


def _csv_rows(file: Any, name: str, delimiter: str) -> Iterator[dict[str, Any]]:
    # what is not UTF-8 comes as surrogates, so that its row can be named
    lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    row = 0
    while True:
        place = f"row {row + 1} (line {reader.line_num + 1})" if header else "the header"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise CorpusError(
                f"cannot read {name}: {place} is quoted wrongly ({error}); a cell that holds quotes stands in double "
                "quotes, and each quote in it is doubled"
            ) from None
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if any(not cell.isascii() and not _is_utf8(cell) for cell in cells):
            raise CorpusError(f"{name}: {place} is not UTF-8")
        if header is None:
            header = cells
            if twice := [cell for cell in header if cell and header.count(cell) > 1]:
                raise CorpusError(f"{name}: the header names the column {twice[0]!r} twice")
            continue
        row += 1
        if len(cells) != len(header):
            raise CorpusError(
                f"{name}: {place} has {len(cells)} cells, but the header has {len(header)}: a text that holds a "
                f"{'tab' if delimiter == chr(9) else 'comma'} must stand in double quotes"
            )
        yield dict(zip(header, cells, strict=True))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of class numbers, as the `datasets` library writes them into a Parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(each) for each in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}
