"""What the command line ends with: exit codes, and which error means which."""

import logging
import os
import sys
from typing import Final, NoReturn

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
CONFLICT: Final = 4
INTERRUPTED: Final = 130

MEANINGS: Final = {
    OK: "done",
    FAILED: "failed",
    USAGE: "wrong usage or unusable input",
    UNREACHABLE: "store or server cannot be reached",
    CONFLICT: "not found, or in conflict with what is there",
    INTERRUPTED: "interrupted, by Ctrl-C or SIGTERM",
}

EPILOG: Final = "Exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."
"""Printed below every --help."""

EXIT_CODES: Final = {
    "range_store.errors.InvalidErasure": USAGE,
    "range_store.errors.NotFitted": USAGE,
    "range_store.errors.InvalidRangeSet": FAILED,
    "range_store.errors.InvalidKey": USAGE,
    "range_store.errors.InvalidStoreAddress": USAGE,
    "range_store.errors.StoreUnavailable": UNREACHABLE,
    "range_store.errors.RangeStoreError": CONFLICT,
    "app.observability.tracing.TracesUnavailable": USAGE,
    "workers.models.errors.ModelError": USAGE,
    "workers.fitting.errors.CorpusError": USAGE,
    "workers.evaluation.evaluate.EvaluationError": USAGE,
    "workers.cluster.errors.RayMissing": USAGE,
    "workers.cluster.errors.ClusterUnavailable": UNREACHABLE,
    "workers.cluster.errors.OtherFleet": CONFLICT,
    "workers.cluster.errors.ClusterError": FAILED,
    "workers.demo.minilm.DemoError": FAILED,
    "workers.engine.errors.EngineError": FAILED,
    "torch.OutOfMemoryError": FAILED,
    "typer.exceptions.Abort": INTERRUPTED,
    "builtins.OSError": FAILED,
    "builtins.KeyboardInterrupt": INTERRUPTED,
}
"""Exit code by the nearest class of an error's ancestry.

Classes are named, not imported: importing some of them would load torch, which `--help` and `erase` never need.
"""


_at_once = False


def end_at_once() -> None:
    """Have `leave` skip what libraries do when a process ends: it would wait for what is lost."""
    global _at_once
    _at_once = True


def leave(code: int) -> NoReturn:
    """End the process, as `sys.exit` does where nothing else was said."""
    if not _at_once:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class CommandError(Exception):
    """A command cannot go on; one line that says what to do, and what to exit with."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that a user can meet; None for one that only a bug can cause."""
    if isinstance(error, CommandError):
        return error.exit_code
    for kind in type(error).__mro__:
        code = EXIT_CODES.get(f"{kind.__module__}.{kind.__qualname__}")
        if code is not None:
            return code
    return None
