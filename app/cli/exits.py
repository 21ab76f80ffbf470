"""Exit codes of the command line; `app.errors` has the table of errors."""

import logging
import os
import sys
from typing import Final, NoReturn

from app import errors
from app.errors import CONFLICT, FAILED, INTERRUPTED, OK, UNREACHABLE, USAGE

MEANINGS: Final = {
    OK: "done",
    FAILED: "failed",
    USAGE: "wrong usage or unusable input",
    UNREACHABLE: "store or server cannot be reached",
    CONFLICT: "not found, or in conflict with what is there",
    INTERRUPTED: "interrupted, by Ctrl-C or SIGTERM",
}

EPILOG: Final = "Exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."
"""Printed below every `--help`."""

_at_once = False


def end_at_once() -> None:
    """Have `leave` skip the exit handlers of libraries, which would wait for a cluster that is lost."""
    global _at_once
    _at_once = True


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` does or, after `end_at_once`, without exit handlers."""
    if not _at_once:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class CommandError(Exception):
    """A command fails: one line that says what to do, and the exit code."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an expected error; None for one that only a bug can cause."""
    return error.exit_code if isinstance(error, CommandError) else errors.exit_code_of(error)
