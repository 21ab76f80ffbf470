"""The reports of `neuronlens evaluate` below one directory: which there are, and their files.

Whatever lies there is taken as foreign: no name leads out of the directory, no link is followed, and what cannot be
read is told as such.
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
MOST = 200
"""Reports that are listed, newest first."""
MOST_RUN_BYTES = 4_000_000


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
    """The part of run.json that is listed."""

    model: _Model
    test: _Test
    settings: _Settings


@dataclass(frozen=True)
class Report:
    """An evaluation's directory. `created_at`: Unix seconds at which its newest file was written.

    `state`: "incomplete" while files are missing (it is under way, or was stopped), "broken" if run.json is unreadable.
    `run`: what run.json says, where it is readable.
    """

    id: str
    state: State
    created_at: float
    files: tuple[FileName, ...]
    run: _Run | None


def list_reports(directory: Path) -> list[Report]:
    """The newest reports, newest first; none if there is no such directory."""
    found: list[tuple[float, str]] = []
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                if _is_name(entry.name) and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
    reports = []
    for _, name in sorted(found, reverse=True)[:MOST]:
        with suppress(UnknownReport):
            reports.append(read_report(directory, name))
    return sorted(reports, key=lambda report: (-report.created_at, report.id))


def read_report(directory: Path, name: str) -> Report:
    """One report.

    Raises:
        UnknownReport: there is none of that name.
    """
    with _folder(directory, name) as folder:
        times: dict[FileName, float] = {}
        for file in FILES:
            with suppress(OSError):
                about = os.stat(file, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(about.st_mode):
                    times[file] = about.st_mtime
        state: State = "complete" if len(times) == len(FILES) else "incomplete"
        run = None
        if "run.json" in times:
            try:
                run = _Run.model_validate_json(_content(folder, "run.json", MOST_RUN_BYTES))
            except (OSError, ValidationError, UnknownReport):
                state = "broken"
        return Report(name, state, max(times.values(), default=os.fstat(folder).st_mtime), tuple(times), run)


def open_file(directory: Path, name: str, file: FileName) -> BinaryIO:
    """A file of a report, to be read and closed.

    Raises:
        UnknownReport: there is no such report, or it has no such file.
    """
    with _folder(directory, name) as folder:
        try:
            return _open(folder, file)
        except OSError:
            raise UnknownReport(file) from None


@contextmanager
def _folder(directory: Path, name: str) -> Iterator[int]:
    """A report's directory, as a descriptor that stays that directory whatever is renamed meanwhile."""
    if not _is_name(name):
        raise UnknownReport(name)
    try:
        folder = os.open(directory / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, ValueError):  # a name may be too long, or hold what no name can
        raise UnknownReport(name) from None
    try:
        yield folder
    finally:
        os.close(folder)


def _content(folder: int, file: FileName, most: int) -> bytes:
    with _open(folder, file) as stream:
        if os.fstat(stream.fileno()).st_size > most:
            raise UnknownReport(file)
        return stream.read(most)


def _open(folder: int, file: FileName) -> BinaryIO:
    opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)  # a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise UnknownReport(file)
    return open(opened, "rb")


def _is_name(name: str) -> bool:
    """Whether it names something in a directory, and nothing hidden, in characters that JSON can say."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
