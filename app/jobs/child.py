"""`neuronlens fit --job DIR`: what a fit that a server started does besides, as told by `app.jobs.runner`.

It keeps out of serving's way, keeps in a file how far it is, and ends with the server: its standard input is a pipe
that the server holds, which the system closes however the server dies.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

from range_store.atomic_files import atomic_write

EVERY = 0.5
"""Seconds between two writes of the progress."""
LEEWAY = 10.0
"""Seconds to end in order when the server is gone."""

CHECKPOINT_SECONDS = 2.0
"""At least between two checkpoints: servers are restarted more often than commands, and writing one is a twentieth of
the time at most."""

PROGRESS = "progress.json"
CHECKPOINTS = "checkpoints"
_PHASES = {"loading the model": "loading", "reading the texts": "reading"}


def begin(job: Path, niceness: int) -> "JobProgress":
    """Lower this process's priority, watch for the server's end, and say that the job is under way."""
    os.nice(niceness)
    threading.Thread(target=_end_with_server, name="server-watch", daemon=True).start()
    return JobProgress(job)


def _end_with_server() -> None:
    # nothing is ever written: this waits for the end. Not by `sys.stdin`, whose lock would stand in the way at the exit
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEEWAY)
    os._exit(1)


class JobProgress:
    """Keeps the progress of a job in `progress.json`, written whole; called like a `Report` of the console."""

    def __init__(self, job: Path) -> None:
        self._file = job / PROGRESS
        self._phase = ""
        self._first = 0
        self._last = 0, 0
        self._began = self._said = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        phase, now = _PHASES.get(what, what), time.monotonic()
        if total:
            self._last = done, total
        done, total = self._last  # while it is published, all are done
        if phase != self._phase:
            self._phase, self._first, self._began = phase, done, now
        elif done < total and now - self._said < EVERY:
            return
        self._said = now
        # what an earlier run had done must not count as speed
        rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
        progress = {
            "phase": phase,
            "rows_done": done,
            "rows_total": total,
            "rows_per_second": round(rate, 2) if rate else None,
            "seconds_left": round((total - done) / rate, 1) if rate and phase == "fitting" else None,
        }
        with atomic_write(self._file) as partial:
            partial.write_text(json.dumps(progress), "utf-8")
