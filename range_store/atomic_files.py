"""Files that are written completely or not at all, and directories that only their owner can enter."""

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
"""How safetensors reports an error number of the system."""


def make_private_directory(path: Path) -> None:
    """Create a directory and its missing parents, with mode 0700.

    An existing directory keeps its mode: its owner may have opened it to a group on purpose.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        make_private_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces `path` at the end. After an error, nothing is left.

    It lies in a directory of its own beside `path`, which may also hold temporary files.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    partial = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.partial")
    try:
        partial.mkdir(exist_ok=True)
        yield partial / path.name
        os.replace(partial / path.name, path)
    except BaseException as error:
        number = _error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial_files(directory: Path, name: str) -> None:
    """Remove what killed processes left of files whose names match the glob `name`."""
    for partial in directory.glob(f".{name}.*.partial"):
        found = _PARTIAL.search(partial.name)
        if found and not _is_running(int(found[1])):
            shutil.rmtree(partial, ignore_errors=True)


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
