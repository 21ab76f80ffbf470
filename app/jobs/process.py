"""The process of one fit: `neuronlens fit --job DIR`, with its own engine, and nothing of the server's memory.

It holds a lock on `alive` in the job's directory, through a descriptor that it inherits: the system lets go of it when
the process dies, however it dies, so that a stale pid can never be mistaken for a fit that runs.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit, urlunsplit

from app.choices import DTypeChoice
from app.jobs.child import CHECKPOINTS, PROGRESS
from app.jobs.requests import FitIn, source_of
from app.settings import Settings

RESULT, LOG, ALIVE = "result.json", "log", "alive"
MOST_SAID = 500
"""Characters of the line that says why a fit failed."""
_HANDED_ON = (
    "fit_niceness",
    "data_dir",
    "redis_ca_file",
    "revision",
    "allow_pickle",
    "plain",
    "template",
    "scoring",
)
"""Settings that hold for a fit as they do for the server."""


def threads_of(settings: Settings) -> int:
    """CPU threads of a fit: half of the cores that this process may use, unless the settings say."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.fit_threads or max(1, cores // 2)


def environment(settings: Settings, dtype: str, name: str) -> dict[str, str]:
    """The environment of a fit: the server's, with the settings that it shares with it, and no other of NeuronLens.

    Args:
        dtype: that the model is served in; `auto` may mean another one on the device of the fit.
    """
    given = {each: getattr(settings, each) for each in _HANDED_ON}
    given |= {"name": name, "dtype": dtype if dtype in get_args(DTypeChoice) else settings.dtype}
    given |= {"device": settings.fit_device or settings.device, "threads": threads_of(settings)}
    given |= {"redis_url": settings.redis_url, "redis_username": settings.redis_username}
    secret = settings.redis_password
    if settings.fit_redis_username is not None or settings.fit_redis_password is not None:
        given["redis_url"] = _without_user(settings.redis_url)  # which would count more
        given["redis_username"] = settings.fit_redis_username or settings.redis_username
        secret = settings.fit_redis_password or secret
    given["redis_password"] = secret.get_secret_value() if secret else None
    own = {f"NEURONLENS_{key.upper()}": str(value) for key, value in given.items() if value is not None}
    return {key: value for key, value in os.environ.items() if not key.upper().startswith("NEURONLENS_")} | own


def _without_user(url: str | None) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class FitProcess:
    """A fit under way; made by `start`."""

    def __init__(self, place: Path, process: "subprocess.Popen[bytes]", hidden: Mapping[str, str]) -> None:
        self._place, self._process, self._hidden = place, process, hidden

    @classmethod
    def start(cls, place: Path, request: FitIn, settings: Settings, model: str, dtype: str, name: str) -> "FitProcess":
        """Start it.

        Args:
            place: the job's directory; nothing runs in it, see `alive`.
            model: the checkpoint. dtype: that it is served in.

        Raises:
            DataRefused, DataUnusable: the data are not there any more; see `fit_requests.source_of`.
            OSError: it cannot be started.
        """
        source = source_of(request, settings)
        label_map: Path | None = None
        if request.label_map is not None:
            label_map = place / "label_map.json"
            label_map.write_text(json.dumps(request.label_map), "utf-8")
        for left in (PROGRESS, RESULT, LOG):
            (place / left).unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "app.cli", "fit", f"--model={model}", f"--job={place}", "--json"]
        command += request.arguments(source, label_map)
        lock = os.open(place / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (place / RESULT).open("wb") as result, (place / LOG).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # held until it ends: closed, it tells the fit that the server is gone
                    stdout=result,
                    stderr=log,
                    env=environment(settings, dtype, name),
                    # Ctrl-C is for the server, which ends it in its own time. No session of its own: where Linux shares
                    # cores out by session, being nice counts inside of one only
                    process_group=0,
                    pass_fds=(lock,),
                )
        finally:
            os.close(lock)
        hidden = {str(place): "its directory"}
        if source is not None and request.data is not None:
            hidden[source] = request.data
        if os.path.isabs(model):  # where it lies is told to admins only
            hidden[model] = name
        return cls(place, process, hidden)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Ask it to end: it keeps its last checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, within that time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def close(self) -> None:
        """Let go of what is held of it, once it has ended."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def complaint(self) -> str:
        """The line with which it failed, with the data named as the request did; empty if it left none."""
        with suppress(OSError):
            lines = (self._place / LOG).read_text("utf-8", "replace").splitlines()
            said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
            said = said.removeprefix("error: ")
            for real, named in self._hidden.items():
                said = said.replace(real, named)
            return said[:MOST_SAID]
        return ""


def result_of(place: Path) -> dict[str, Any] | None:
    """What the fit of a job printed when it had published; None if it did not come so far."""
    return _object(place / RESULT)


def progress_of(place: Path) -> dict[str, Any]:
    """How far the fit of a job is, as `JobProgress` keeps it."""
    return _object(place / PROGRESS) or {}


def _object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def alive(place: Path) -> bool:
    """Whether a process of the job runs, of whichever server."""
    try:
        lock = os.open(place / ALIVE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def kill_left(pid: int) -> None:
    """End a process of a job that outlives its server. Only while `alive`: else the pid may be somebody else's."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def discard(place: Path) -> None:
    """Take out what only a fit that goes on needs."""
    import shutil

    shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
    for name in ("label_map.json", "cancel", ALIVE):
        (place / name).unlink(missing_ok=True)
