"""Files that are there whole or not at all, errors that name them, and directories that only their owner can enter."""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_PARTIAL = re.compile(r"\.(\d+)\.partial$")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors tells what the system said."""


def make_private_directory(path: Path) -> None:
    """Make a directory, and the missing ones above it, that only its owner can enter (mode 0700).

    One that exists keeps its mode: whoever made it may have opened it to a group on purpose.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        make_private_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end; after an error nothing is left.

    It lies in a directory of its own beside `path`, where writers may put what they need meanwhile.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    partial = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.partial")
    try:
        partial.mkdir(exist_ok=True)
        yield partial / path.name
        os.replace(partial / path.name, path)
    except BaseException as error:
        number = _number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial_files(directory: Path, name: str) -> None:
    """Take out what processes that were killed had written of files whose names match `name`, a glob."""
    for partial in directory.glob(f".{name}.*.partial"):
        found = _PARTIAL.search(partial.name)
        if found and not _lives(int(found[1])):
            shutil.rmtree(partial, ignore_errors=True)


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
