"""Runs the fits of one served model, one at a time, each in a process of its own (`app.jobs.process`).

Every server that takes fits has a runner. The one that holds the lease in Redis (`range_store.storage.jobs`) runs the
jobs; when it ends or dies, another one takes over. A fit ends with its server, and resumes from its checkpoint where
the next server has the same data directory.

RQ does not replace this module, with its JSON serializer either. A job of RQ names the function that the worker imports
and calls, so whoever can write to Redis could run code. A fit that ends with its worker counts as failed, and is found
only minutes later. RQ keeps tracebacks, which may quote texts. One runner for each model, the bounded queue and
idempotency keys would remain to be written, and the server's Redis user would need some twenty more commands, on keys
outside `neuronlens:`.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from app.jobs.child import CHECKPOINTS, LOCK
from app.jobs.process import LABEL_MAP, FitProcess
from app.jobs.schemas import DataRefused, DataUnusable, FitIn
from app.settings import Settings
from range_store.atomic_files import make_private_directory
from range_store.domain.range_set import check_dtype
from range_store.errors import RangeStoreError, StoreUnavailable
from range_store.formatting import format_count
from range_store.storage.jobs import OVER, Job, Jobs, JobStore
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import new_replica_name
from range_store.storage.store import RangeStore
from workers.models.facts import ModelFacts

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Processes of one job, where they are killed, or the store or the server goes away while they run."""
TICK = 1.0
"""Seconds between two looks at the jobs; changes wake the runner at once. The lease must outlast several."""
PAUSE = 5.0
"""Seconds before the second attempt; twice that before the third."""
KEPT_SECONDS = 86_400.0
"""How long the directory of a job that is not kept any more stays, unless something in it changes."""
TEMPORARY = frozenset({"unreachable", "LOADING", "BUSY"})
"""Failures of the store after which another attempt may succeed, by `StoreUnavailable.code`."""


class FitRunner:
    """A thread that starts, watches and ends fits.

    Args:
        on_change: called with the jobs when they have changed; on any thread, so it must be quick.
    """

    def __init__(
        self,
        jobs: JobStore,
        settings: Settings,
        model: ModelFacts,
        store: RangeStore,
        mirror: Mirror,
        on_change: Callable[[Jobs], None],
    ) -> None:
        self._store, self._jobs, self._mirror, self._settings = store, jobs, mirror, settings
        self._model, self._on_change = model, on_change
        self._name = new_replica_name()
        self._directories = (settings.data_dir / "jobs").absolute() / sha256(jobs.model.encode()).hexdigest()[:16]
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fits")
        self._refreshing = threading.Lock()
        self._process: FitProcess | None = None
        self._not_before: dict[str, float] = {}
        self._cleaned_up_for: tuple[Job, ...] | None = None
        self.known = Jobs(jobs.model)
        """The jobs as last read."""
        self.holds_lease = False
        """Whether this server runs the jobs."""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop. A fit under way ends, keeps its checkpoint, and resumes on the next server."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def refresh(self) -> Jobs:
        """Read the jobs; if they have changed, report that and wake the runner. Raises StoreUnavailable."""
        with self._refreshing:
            before, self.known = self.known, self._jobs.read()
            if self.known.jobs != before.jobs:
                self._wake.set()
            if self.known != before:
                self._on_change(self.known)
            return self.known

    def _run(self) -> None:
        failing = False
        try:
            while not self._stopping.is_set():
                try:
                    self._step()
                    failing = False
                except Exception as error:  # neither a store that is away nor a full disk may end the thread
                    if not failing:
                        logger.error("fits: %s: %s; trying again", type(error).__name__, error)
                    failing = True
                self._wake.wait(TICK)
                self._wake.clear()
        finally:
            with suppress(StoreUnavailable):
                self._put_aside()
                if self.holds_lease:
                    self._jobs.release_lease(self._name)
            self.holds_lease = False

    def _step(self) -> None:
        """Do what is due."""
        process = self._process
        held = self.holds_lease
        running, progress = (process.job.id, process.progress) if process else (None, {})
        self.holds_lease = self._jobs.hold_lease(self._name, running, progress)
        if not self.holds_lease:
            if process is not None:  # its job is another runner's now
                self._drop(process)
            return
        if not held:
            make_private_directory(self._directories)
            self._import_files()
        jobs = self.refresh()
        if process is None:
            if self._cleaned_up_for != jobs.jobs:
                self._clean_up(jobs)
                self._cleaned_up_for = jobs.jobs
            self._start_next(jobs)
            return
        job = jobs.find(process.job.id) or self._jobs.update(process.job)  # Redis may have been emptied
        if process.exit_code is not None:
            self._finish(job, process, process.exit_code)
        elif job.over or job.state == "cancelling":
            process.end()

    def _start_next(self, jobs: Jobs) -> None:
        """Start the job that was under way when its server died, else the oldest that waits."""
        pending = [job for job in reversed(jobs.jobs) if not job.over]
        for job in sorted(pending, key=lambda job: job.state == "queued"):
            if job.state == "cancelling":
                self._change(job, state="cancelled")
            elif time.monotonic() >= self._not_before.get(job.id, 0.0):
                self._start(job)
                return

    def _start(self, job: Job) -> None:
        if job.fingerprint != self._model.identity.fingerprint:
            self._change(job, state="failed", error="the server has another model of this name now")
            return
        if job.attempts >= MAX_ATTEMPTS:
            why = job.error or "the server ended while it ran"
            self._change(job, state="failed", error=f"given up after {format_count(job.attempts, 'attempt')}: {why}")
            return
        job = self._change(job, state="running", attempts=job.attempts + 1, started_at=job.started_at or time.time())
        if job.state != "running":  # cancelled meanwhile
            return
        where = self._directories / job.id
        try:
            self._process = FitProcess(job, where, self._settings, self._model, self._jobs.model, self._wake.set)
        except (DataRefused, DataUnusable) as error:
            self._change(job, state="failed", error=str(error))
        except ValidationError:
            self._change(job, state="failed", error="the request has fields that this version of the server lacks")
        except OSError as error:
            self._retry(job, f"its process cannot be started: {error.strerror}", None)
        else:
            logger.info("fit %s: started, process %d, attempt %d", job.id, self._process.pid, job.attempts)
            self._wake.set()  # have the next step report it as running

    def _finish(self, job: Job, process: FitProcess, code: int) -> None:
        """Record how a process ended. It is called again if Redis cannot take that."""
        error = process.error_line()
        if process.range_set is not None:
            self._publish(job, process.range_set)
        elif job.state == "cancelling":
            self._change(job, state="cancelled")
        elif code < 0 or process.store_error in TEMPORARY:
            killed = f"its process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
            self._retry(job, error or killed, code)
        else:
            if process.store_error == "NOPERM":
                error += "; set NEURONLENS_FIT_REDIS_USERNAME and …_PASSWORD to a user that may publish"
            self._change(job, state="failed", error=error or f"its process ended with code {code}", exit_code=code)
        self._drop(process)
        self._wake.set()

    def _retry(self, job: Job, error: str, exit_code: int | None) -> None:
        """Queue a job again after an attempt that failed."""
        self._not_before[job.id] = time.monotonic() + PAUSE * job.attempts
        self._change(job, state="queued", error=error, exit_code=exit_code)
        logger.warning("fit %s: attempt %d ended: %s", job.id, job.attempts, error)

    def _publish(self, job: Job, range_set: str) -> None:
        """Record a published range set; activate it if that was requested and the job is not being cancelled."""
        request = FitIn.model_validate(job.request)
        changes = {"state": "done", "range_set": range_set, "error": None, "exit_code": 0}
        if request.activate and not job.over and job.state != "cancelling":
            try:
                if not request.force:
                    check_dtype(self._store.range_sets.provenance(range_set), (self._model.dtype,))
                state = self._store.activate(range_set, request.force, None, job.by, request.reason)
                changes["generation"] = state.generation
                with suppress(StoreUnavailable):
                    self._mirror.refresh()
            except RangeStoreError as error:
                if isinstance(error, StoreUnavailable) and (error.code or "unreachable") in TEMPORARY:
                    raise
                changes |= {"state": "failed", "error": f"range set {range_set} is published, but not active: {error}"}
        self._change(job, **changes)

    def _change(self, job: Job, **changes: Any) -> Job:
        """Change a job in the store."""
        if changes["state"] in OVER:
            changes["ended_at"] = time.time()
        job = self._jobs.update(job, **changes)
        self.refresh()
        if job.over:
            self._not_before.pop(job.id, None)
            result = f"range set {job.range_set}" if job.state == "done" else job.error or ""
            logger.info("fit %s: %s%s", job.id, job.state, f": {result}" if result else "")
        return job

    def _clean_up(self, jobs: Jobs) -> None:
        """Remove what only a fit that resumes needs, and directories of jobs that are not kept any more."""
        for directory in self._directories.iterdir():
            job = jobs.find(directory.name)
            if job is None and time.time() - directory.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(directory, ignore_errors=True)
            elif job is not None and job.over:
                shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
                for name in (LABEL_MAP, LOCK):
                    (directory / name).unlink(missing_ok=True)

    def _put_aside(self) -> None:
        """End the fit under way and queue its job again, which does not count as an attempt."""
        process = self._process
        if process is None:
            return
        self._drop(process)
        if process.range_set is not None:
            self._publish(process.job, process.range_set)
        else:
            self._change(process.job, state="queued", attempts=process.job.attempts - 1)

    def _drop(self, process: FitProcess) -> None:
        """End a process, if it has not ended, and forget it."""
        process.wait_for_end()
        process.close()
        self._process = None

    def _import_files(self) -> None:
        """Take over the jobs of this model that earlier versions kept in files (`jobs/{id}/job.json`)."""
        files = list(self._directories.parent.glob("*/job.json"))
        if not files:
            return
        with suppress(Timeout), FileLock(f"{self._directories}.runner", timeout=0):  # a server that runs holds it
            for file in files:
                with suppress(OSError, ValueError, KeyError, TypeError):
                    fields = json.loads(file.read_bytes())
                    if fields["model"] != self._jobs.model:
                        continue
                    job = Job.model_validate(fields)
                    if not job.over and (file.parent / "cancel").exists():
                        job = job.model_copy(update={"state": "cancelling"})
                    self._jobs.update(job)
                    file.parent.rename(self._directories / job.id)
                    (self._directories / job.id / file.name).unlink()
