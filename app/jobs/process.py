"""The process of one fit, `neuronlens fit --job DIR`, as its server sees it; `app.jobs.child` is the other side."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit, urlunsplit

from app.jobs.schemas import FitIn, source_of
from app.settings import DType, ModelSettings, Settings
from range_store.atomic_files import make_private_directory
from range_store.storage.jobs import Job
from workers.models.facts import ModelFacts

LOG, LABEL_MAP = "log", "label_map.json"
MAX_ERROR_LENGTH = 500
PATIENCE = 15.0
"""Seconds that a process has to end in order before it is killed."""
_SHARED_SETTINGS = (
    "fit_niceness",
    "data_dir",
    "redis_ca_file",
    *(set(ModelSettings.model_fields) - {"model", "compile"}),
)
"""Settings that a fit takes over from its server."""


def environment(settings: Settings, dtype: str, name: str) -> dict[str, str]:
    """Return the environment of a fit: the server's, with only those NEURONLENS variables that a fit shares with it.

    Args:
        dtype: the dtype that the model is served in; `auto` may mean another one on the device of the fit.
    """
    values = {each: getattr(settings, each) for each in _SHARED_SETTINGS}
    values |= {"name": name, "dtype": dtype if dtype in get_args(DType) else settings.dtype}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values |= {"device": settings.fit_device or settings.device, "threads": settings.fit_threads or max(1, cores // 2)}
    url, username, password = settings.redis_url, settings.redis_username, settings.redis_password
    if settings.fit_redis_username is not None or settings.fit_redis_password is not None:
        if url is not None:  # a user in the URL would take precedence
            parts = urlsplit(url)
            url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        username = settings.fit_redis_username or username
        password = settings.fit_redis_password or password
    values |= {"redis_url": url, "redis_username": username}
    values["redis_password"] = password.get_secret_value() if password else None
    own = {f"NEURONLENS_{key.upper()}": str(value) for key, value in values.items() if value is not None}
    return {key: value for key, value in os.environ.items() if not key.upper().startswith("NEURONLENS_")} | own


class FitProcess:
    """The process of a fit.

    Args:
        directory: of the job; holds its checkpoints and its log.
        name: the name that the model is served under.
        on_end: called on another thread when the process has ended.

    Attributes:
        progress: what it last reported, with the fields of `app.jobs.schemas.ProgressOut`.
        range_set: id of the range set that it published; None before.
        store_error: Redis's error code, or "unreachable", if the store made it fail.

    Raises:
        DataRefused, DataUnusable: the data are not there any more; see `source_of`.
        ValidationError: `job.request` is not one that this version knows.
        OSError: it cannot be started.
    """

    def __init__(
        self, job: Job, directory: Path, settings: Settings, model: ModelFacts, name: str, on_end: Callable[[], None]
    ) -> None:
        request = FitIn.model_validate(job.request)
        source = source_of(request, settings)
        make_private_directory(directory)
        label_map = directory / LABEL_MAP if request.label_map is not None else None
        if label_map is not None:
            label_map.write_text(json.dumps(request.label_map), "utf-8")
        self.job, self.progress = job, dict[str, Any]()
        self.range_set: str | None = None
        self.store_error: str | None = None
        self._log, self._on_end = directory / LOG, on_end
        self._terminated_at: float | None = None
        self._replacements = {str(directory): "its directory"}
        if source is not None and request.data is not None:
            self._replacements[source] = request.data
        if os.path.isabs(model.source):  # only admins may see where it is
            self._replacements[model.source] = name
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "app.cli", "fit", f"--model={model.source}", f"--job={directory}"),
                    *request.arguments(source, label_map),
                ],
                stdin=subprocess.PIPE,  # closed when the server ends, which ends the fit
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(settings, model.dtype, name),
                # Ctrl-C is for the server, which then ends the fit. Not a session of its own: where Linux shares cores
                # between sessions, niceness counts only within one
                process_group=0,
            )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read_messages, name="fit-messages", daemon=True)
        self._reader.start()

    def _read_messages(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as messages:
            for line in messages:
                with suppress(ValueError, AttributeError):  # a library may print, too
                    message = json.loads(line)
                    self.progress = message.get("progress", self.progress)
                    self.range_set = message.get("range_set", self.range_set)
                    self.store_error = message.get("store_error", self.store_error)
        self._process.wait()
        self._on_end()

    @property
    def exit_code(self) -> int | None:
        """Exit code, or minus the signal that killed it; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(1.0)  # the last messages
        return code

    def end(self) -> None:
        """Request its end, for which it keeps its last checkpoint; kill it if a call comes `PATIENCE` seconds later."""
        if self._terminated_at is None:
            self._terminated_at = time.monotonic()
            self._process.terminate()
        elif time.monotonic() - self._terminated_at > PATIENCE:
            self._process.kill()

    def wait_for_end(self) -> None:
        """End it, and wait until it has ended."""
        while self.exit_code is None:
            self.end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)

    def close(self) -> None:
        """Release its stdin, once it has ended."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def error_line(self) -> str:
        """Return the error line of the command, with the data named as in the request; empty if there is none."""
        with suppress(OSError):
            lines = self._log.read_text("utf-8", "replace").splitlines()
            error = next((line for line in reversed(lines) if line.startswith("error: ")), "")
            error = error.removeprefix("error: ")
            for path, replacement in self._replacements.items():
                error = error.replace(path, replacement)
            return error[:MAX_ERROR_LENGTH]
        return ""
