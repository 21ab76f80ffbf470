"""The reports of `neuronlens evaluate` in one directory, and their files.

The content of the directory is not trusted: names cannot leave it, links are not followed, and a file that cannot be
read makes its report "broken".
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from pydantic import BaseModel, ValidationError

FileName = Literal["report.html", "results.csv", "run.json"]
FILES: tuple[FileName, ...] = get_args(FileName)
State = Literal["complete", "incomplete", "broken"]
MAX_REPORTS = 200
"""Maximum number of listed reports, the newest ones."""
MAX_RUN_BYTES = 4_000_000
"""Maximum size of run.json."""


class UnknownReport(Exception):
    """There is no such report, or it has no such file."""


class _Model(BaseModel):
    id: str


class _Test(BaseModel):
    name: str
    rows: int


class _Settings(BaseModel):
    targets: list[str]
    methods: list[str]


class _Run(BaseModel):
    """The listed part of run.json."""

    model: _Model
    test: _Test
    settings: _Settings


@dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Attributes:
        state: "incomplete" if files are missing (the evaluation is running or was interrupted), "broken" if run.json
            cannot be read.
        created_at: modification time of the newest file in Unix seconds.
        run: content of run.json; None if it is missing or cannot be read.
    """

    id: str
    state: State
    created_at: float
    files: tuple[FileName, ...]
    run: _Run | None


def list_reports(directory: Path) -> list[Report]:
    """The newest reports, newest first; empty if there is no such directory."""
    found: list[tuple[float, str]] = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                if _is_valid(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
    reports = []
    for _, name in sorted(found, reverse=True)[:MAX_REPORTS]:
        with suppress(UnknownReport):
            reports.append(read_report(directory, name))
    return sorted(reports, key=lambda report: (-report.created_at, report.id))


def read_report(directory: Path, name: str) -> Report:
    """One report.

    Raises:
        UnknownReport: there is none of that name.
    """
    with _open_folder(directory, name) as folder:
        times: dict[FileName, float] = {}
        for file in FILES:
            with suppress(OSError):
                status = os.stat(file, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    times[file] = status.st_mtime
        state: State = "complete" if len(times) == len(FILES) else "incomplete"
        run = None
        if "run.json" in times:
            try:
                with _open(folder, "run.json") as stream:
                    if os.fstat(stream.fileno()).st_size > MAX_RUN_BYTES:
                        raise UnknownReport(name)
                    run = _Run.model_validate_json(stream.read(MAX_RUN_BYTES))
            except (OSError, ValidationError, UnknownReport):
                state = "broken"
        return Report(name, state, max(times.values(), default=os.fstat(folder).st_mtime), tuple(times), run)


def open_file(directory: Path, name: str, file: FileName) -> BinaryIO:
    """Open a file of a report for reading.

    Raises:
        UnknownReport: there is no such report, or it has no such file.
    """
    with _open_folder(directory, name) as folder:
        try:
            return _open(folder, file)
        except OSError:
            raise UnknownReport(file) from None


@contextmanager
def _open_folder(directory: Path, name: str) -> Iterator[int]:
    """A descriptor of a report's directory. It stays valid if the directory is renamed."""
    if not _is_valid(name):
        raise UnknownReport(name)
    try:
        folder = os.open(directory / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, ValueError):  # ValueError: an impossible name
        raise UnknownReport(name) from None
    try:
        yield folder
    finally:
        os.close(folder)


def _open(folder: int, file: FileName) -> BinaryIO:
    # O_NONBLOCK: opening a named pipe would wait for a writer
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnknownReport(file)
    return open(descriptor, "rb")


def _is_valid(name: str) -> bool:
    """Whether it is the name of a visible directory entry that can be encoded as JSON."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
