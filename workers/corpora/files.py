"""Files of labelled texts: which files a source names, and the text and label of each row.

Own parsers rather than pandas or pyarrow: no type is guessed ("NA" is a text), a lone surrogate is kept, and an error
names the row.
"""

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

from workers.corpora.data_names import (
    READABLE,
    format_of,
    is_hub_name,
    is_remote,
    split_compression,
    without_credentials,
)
from workers.corpora.errors import CorpusError

TABLE_ROWS = 4096
SCHEMA = pa.schema([("text", pa.large_binary()), ("label", pa.large_string())])
"""How texts and labels are kept: a text as UTF-8 with lone surrogates, null where there is none; a label as JSON."""

_HEAD_ROWS = 1024
"""Rows of a file that decide its columns, where rows need not all have the same ones."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
}
csv.field_size_limit(sys.maxsize)  # texts may be long


def is_saved_dataset(source: str) -> bool:
    """Whether it is a directory in which the `datasets` library saved a data set."""
    return any(Path(source, name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def is_hub_dataset(source: str) -> bool:
    """Whether it may name a data set on the hub, and no file or directory has this name."""
    return is_hub_name(source) and not Path(source).exists()


def root_cause(error: BaseException) -> str:
    """The first line of the error at the start of a chain: libraries pass on whatever their parsers raise."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def files_of(source: str) -> tuple[str, ...]:
    """The files of a path, directory, pattern or address, sorted. A path that exists is never read as a pattern.

    Raises:
        CorpusError: there are no files, or they are of an unknown kind or of several splits.
    """
    name = without_credentials(source)
    directory = ""
    try:
        system, path = _system(source)
        if system.isdir(path):
            directory = path
            found = [file for file in system.find(path) if format_of(file) and not _is_hidden(file, directory)]
            if not found:
                raise CorpusError(f"{name} has no files that can be read: {READABLE}")
        elif system.exists(path):
            found = [path]
        elif any(character in path for character in "*?["):
            found = [file for file in system.glob(path) if system.isfile(file)]
        else:
            found = []
    except CorpusError:
        raise
    except Exception as error:  # any file system may serve the address
        raise CorpusError(f"cannot look up {name}: {root_cause(error)}") from error
    if not found:
        raise CorpusError(f"no such file: {name}")
    if unknown := [file for file in found if format_of(file) is None]:
        raise CorpusError(f"{PurePath(unknown[0]).name}: unknown kind of file; use {READABLE}")
    splits = {split: file for file in sorted(found, reverse=True) if (split := _split_of(file, directory))}
    if directory and len(splits) > 1:
        files = " and ".join(PurePath(file).name for file in sorted(splits.values()))
        raise CorpusError(f"{name} has several splits, such as {files}: name the files of one of them")
    if not is_remote(source):
        return tuple(sorted(found))
    return (source,) if found == [path] else tuple(sorted(system.unstrip_protocol(file) for file in found))


def columns_of(paths: Sequence[str]) -> tuple[tuple[str, ...], dict[str, list[str]]] | None:
    """Columns of the first file with any rows, and its names of class numbers by column; None if no file has rows.

    Raises:
        CorpusError: a file cannot be read.
    """
    for path in paths:
        with _opened(path) as file:
            if format_of(path) == "parquet":
                parquet = pq.ParquetFile(file)
                if parquet.metadata.num_rows:
                    return tuple(parquet.schema_arrow.names), _class_names(parquet.schema_arrow)
                continue
            rows = list(islice(_rows(file, path), _HEAD_ROWS))
            if rows:
                return tuple(dict.fromkeys(name for row in rows for name in row)), {}
    return None


def read_tables(path: str, text_field: str, label_field: str) -> Iterator[pa.Table]:
    """Texts and labels of a file in its order, as tables of `SCHEMA`. A row without such a column has a null.

    Raises:
        CorpusError: the file cannot be read; names the file, and the row if there is one.
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
def _label(text: str) -> Any:
    return json.loads(text)


def _system(source: str) -> tuple[Any, str]:
    """The file system of a path or address, and the path there. No character of a local path is special."""
    if is_remote(source):
        system, path = fsspec.core.url_to_fs(source)
        return system, path
    return LocalFileSystem(), LocalFileSystem._strip_protocol(source)


def _is_hidden(path: str, directory: str) -> bool:
    return any(part.startswith(".") for part in PurePath(path.removeprefix(directory)).parts)


def _split_of(path: str, directory: str) -> str | None:
    words = re.split("[^a-z]+", path.removeprefix(directory).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The uncompressed bytes of a file. Any failure to read it becomes a CorpusError that names the file."""
    try:
        system, inside = _system(path)
        with system.open(inside, "rb", compression=split_compression(path)[1]) as file:
            yield file
    except CorpusError:
        raise
    except Exception as error:  # any file system and decompressor may be at work
        raise CorpusError(f"cannot read {PurePath(path).name}: {root_cause(error)}") from error


def _texts_and_labels(path: str, text_field: str, label_field: str) -> Iterator[tuple[Any, Any]]:
    name = PurePath(path).name
    with _opened(path) as file:
        if format_of(path) != "parquet":
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
    kind, name = format_of(path), PurePath(path).name
    return _json_rows(file, name) if kind == "json" else _csv_rows(file, name, "\t" if kind == "tsv" else ",")


def _json_rows(file: Any, name: str) -> Iterator[dict[str, Any]]:
    row = 0
    lines = io.BufferedReader(file)  # a streamed address cannot be iterated by line
    for raw in lines:
        line = raw.removeprefix(b"\xef\xbb\xbf").strip() if not row else raw.strip()
        if not line:
            continue
        row += 1
        if row == 1 and line.startswith(b"["):  # one array of all rows
            for row, value in enumerate(_parse(line + b"".join(lines), f"{name}: the array"), 1):
                yield _object(value, name, row)
            return
        yield _object(_parse(line, f"{name}: row {row}"), name, row)


def _parse(raw: bytes, place: str) -> Any:
    try:
        return json.loads(raw.decode())
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
    # bytes that are not UTF-8 are read as surrogates, so that the error can name their row
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
                f"cannot read {name}: {place} is quoted wrongly ({error}); a cell with quotes must be enclosed in "
                "double quotes, and each quote in it must be doubled"
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
                f"{name}: {place} has {len(cells)} cells, but the header has {len(header)}: a text with a "
                f"{'tab' if delimiter == chr(9) else 'comma'} must be enclosed in double quotes"
            )
        yield dict(zip(header, cells, strict=True))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of class numbers by column, as the `datasets` library writes them into a Parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(each) for each in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError):
        return {}
