"""The side of `neuronlens fit --job DIR`, a fit that a server started: `app.jobs.process` has the server's side.

It writes messages to stdout, one JSON object a line, and ends with the server: its stdin is a pipe that the server
holds, which the system closes however the server ends.
"""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from range_store.errors import InvalidStoreAddress, StoreUnavailable

MESSAGE_SECONDS = 0.5
"""Seconds between two messages of progress."""
END_SECONDS = 10.0
"""Seconds to end in order once the server is gone."""
CHECKPOINT_SECONDS = 2.0
"""Seconds between two checkpoints, at least: servers are restarted more often than commands, and writing a checkpoint
takes a twentieth of the time at most."""

CHECKPOINTS = "checkpoints"
LOCK = "lock"
"""File in the job's directory that its process locks and writes its pid into."""
_PHASES = {"loading the model": "loading", "reading the texts": "reading"}


class ServerJob:
    """A context manager around the fit, which reports to the server; called like an `OnProgress` of `app.cli.terminal`.

    Args:
        niceness: added to that of this process.
    """

    def __init__(self, directory: Path, niceness: int) -> None:
        os.nice(niceness)
        threading.Thread(target=_end_with_server, name="server-watch", daemon=True).start()
        # the process of a server that was killed may still write checkpoints
        self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())
        self._phase = ""
        self._rows = 0, 0
        self._first_row = 0
        self._phase_began = self._reported_at = 0.0

    def __enter__(self) -> "ServerJob":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, StoreUnavailable) and not isinstance(error, InvalidStoreAddress):
            _send({"store_error": error.code or "unreachable"})

    def __call__(self, phase: str, done: int, total: int) -> None:
        phase, now = _PHASES.get(phase, phase), time.monotonic()
        if total:
            self._rows = done, total
        done, total = self._rows  # while it publishes, all rows are done
        if phase != self._phase:
            self._phase, self._first_row, self._phase_began = phase, done, now
        elif done < total and now - self._reported_at < MESSAGE_SECONDS:
            return
        self._reported_at = now
        # rows that an earlier process had done do not count towards the speed
        rate = (done - self._first_row) / (now - self._phase_began) if now > self._phase_began else 0.0
        progress = {
            "phase": phase,
            "rows_done": done,
            "rows_total": total,
            "rows_per_second": round(rate, 2) if rate else None,
            "seconds_left": round((total - done) / rate, 1) if rate and phase == "fitting" else None,
        }
        _send({"progress": progress})

    def published(self, range_set: str) -> None:
        """Report the id of the published range set."""
        _send({"range_set": range_set})


def _send(message: dict[str, object]) -> None:
    with suppress(BrokenPipeError):  # the server is gone, and this process about to end
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def _end_with_server() -> None:
    # nothing is ever written to stdin. `sys.stdin` has a lock that the exit would wait for
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)
