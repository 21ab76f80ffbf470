"""What the name of a data source says, before anything is read. Standard library only."""

import re
from pathlib import PurePath

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
READABLE = ".jsonl, .csv, .tsv or .parquet (all but .parquet also with .gz, .bz2 or .xz behind it)"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def split_compression(path: str) -> tuple[str, str | None]:
    """The path without the suffix of a compressed file, and the compression."""
    suffix = PurePath(path).suffix.lower()
    return (path[: -len(suffix)], COMPRESSIONS[suffix]) if suffix in COMPRESSIONS else (path, None)


def format_of(path: str) -> str | None:
    """The format of a file: "json", "csv", "tsv" or "parquet"; None if it cannot be read."""
    plain, compression = split_compression(path)
    found = FORMATS.get(PurePath(plain).suffix.lower())
    return None if compression and found == "parquet" else found


def is_hub_name(source: str) -> bool:
    """Whether a data set on the hub may have this name."""
    return format_of(source) is None and HUB_NAME.fullmatch(source) is not None


def is_remote(source: str) -> bool:
    """Whether it is an address rather than a path of this machine."""
    return "://" in source and not source.startswith("file://")


def without_credentials(source: str) -> str:
    """An address without the user and password that may precede its host."""
    return re.sub(r"://[^/@]*@", "://", source)
