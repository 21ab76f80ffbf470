"""Runs the fits of one served model, one at a time, each in a process of its own (`app.jobs.process`).

Every server that takes fits has a runner. The one that holds the lease in Redis (`range_store.storage.jobs`) runs the
jobs; when it ends or dies, another one takes over. A fit ends with its server, and resumes from its checkpoint where
the next server has the same data directory.

RQ does not replace this module. A job of RQ names the function that the worker imports and calls, so whoever can write
to Redis could run code, with the JSON serializer too. RQ counts a fit that ends with its server as failed, and finds
the job of a worker that died only after minutes. One runner for each model, the bounded queue, idempotency keys, and
error texts without users' data would remain to be written; and the server's Redis user would need some twenty more
commands, on keys that no prefix sets apart.
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

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Processes of one job, where they are killed, or the store or the server goes away while they run."""
TICK = 1.0
"""Seconds between two looks at the jobs; changes wake the runner at once. The lease must outlast several."""
PATIENCE = 15.0
"""Seconds that a process has to end in order before it is killed."""
PAUSE = 5.0
"""Seconds before the second attempt; twice that before the third."""
KEPT_SECONDS = 86_400.0
"""How long the directory of a job that is not kept any more stays, unless something in it changes."""
TEMPORARY = frozenset({"unreachable", "LOADING", "BUSY"})
"""Failures of the store after which another attempt may succeed, by `StoreUnavailable.code`."""


class FitRunner:
    """A thread that starts, watches and ends fits.

    Args:
        model: the checkpoint. dtype: the dtype that it is served in, and so fitted in. fingerprint: of the model.
        on_change: called with each job that changed, and its progress; on any thread, so it must be quick.
    """

    def __init__(
        self,
        jobs: JobStore,
        settings: Settings,
        model: str,
        dtype: str,
        fingerprint: str,
        store: RangeStore,
        mirror: Mirror,
        on_change: Callable[[Job, dict[str, Any] | None], None],
    ) -> None:
        self._store, self._jobs, self._mirror, self._settings = store, jobs, mirror, settings
        self._model, self._dtype, self._fingerprint = model, dtype, fingerprint
        self._on_change = on_change
        self._name = new_replica_name()
        self._directories = (settings.data_dir / "jobs").absolute() / sha256(jobs.model.encode()).hexdigest()[:16]
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fits")
        self._refreshing = threading.Lock()
        self._job: Job | None = None
        self._process: FitProcess | None = None
        self._terminated_at: float | None = None
        self._not_before: dict[str, float] = {}
        self._cleaned_up_for: tuple[Job, ...] | None = None
        self.known = Jobs()
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
        """Read the jobs, report those that changed, and wake the runner if there are any. Raises StoreUnavailable."""
        with self._refreshing:
            before, now = self.known, self._jobs.read()
            self.known = now
            for job in reversed(now.jobs):
                old, progress = before.find(job.id), now.progress_of(job)
                if job != old:
                    self._wake.set()
                if job != old or progress != before.progress_of(job):
                    self._on_change(job, progress)
            return now

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
            try:
                self._put_aside()
            finally:
                self._abandon()
                if self.holds_lease:
                    with suppress(StoreUnavailable):
                        self._jobs.release_lease(self._name)
                self.holds_lease = False

    def _step(self) -> None:
        """Do what is due."""
        running = self._job.id if self._job else None
        progress = self._process.progress if self._process else {}
        held, self.holds_lease = self.holds_lease, self._jobs.hold_lease(self._name, running, progress)
        if not self.holds_lease:
            self._abandon()
            return
        if not held:
            make_private_directory(self._directories)
            self._import_files()
        jobs = self.refresh()
        if self._job is None or self._process is None:
            if self._cleaned_up_for != jobs.jobs:
                self._clean_up(jobs)
                self._cleaned_up_for = jobs.jobs
            self._start_next(jobs)
            return
        job = jobs.find(self._job.id)
        if job is None:  # Redis was emptied
            job = self._job
            self._jobs.restore(job)
        code = self._process.exit_code
        if code is not None:
            self._finish(job, self._process, code)
            self._wake.set()
        elif job.over or job.state == "cancelling":
            self._end(self._process)

    def _end(self, process: FitProcess) -> None:
        if self._terminated_at is None:
            self._terminated_at = time.monotonic()
            process.terminate()
        elif time.monotonic() - self._terminated_at > PATIENCE:
            process.kill()

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
        if job.fingerprint != self._fingerprint:
            self._change(job, state="failed", error="the server has another model of this name now")
            return
        if job.attempts >= MAX_ATTEMPTS:
            why = job.error or "the server ended while it ran"
            self._change(job, state="failed", error=f"given up after {format_count(job.attempts, 'attempt')}: {why}")
            return
        job = self._change(job, state="running", attempts=job.attempts + 1, started_at=job.started_at or time.time())
        if job.state != "running":  # cancelled meanwhile
            return
        directory = self._directories / job.id
        make_private_directory(directory)
        try:
            request = FitIn.model_validate(job.request)
            self._process = FitProcess(
                directory, request, self._settings, self._model, self._dtype, self._jobs.model, self._wake.set
            )
        except (DataRefused, DataUnusable) as error:
            self._change(job, state="failed", error=str(error))
            return
        except ValidationError:
            self._change(job, state="failed", error="the request has fields that this version of the server lacks")
            return
        except OSError as error:
            self._retry(job, f"its process cannot be started: {error.strerror}", None)
            return
        self._job, self._terminated_at = job, None
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
        process.close()
        self._job = self._process = None

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
                    check_dtype(self._store.provenance(range_set), (self._dtype,))
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
        job, process = self._job, self._process
        if job is None or process is None:
            return
        process.terminate()
        if not process.wait(PATIENCE):
            process.kill()
            process.wait(PATIENCE)
        with suppress(StoreUnavailable):
            if process.range_set is not None:
                self._publish(job, process.range_set)
            else:
                self._change(job, state="queued", attempts=job.attempts - 1)

    def _abandon(self) -> None:
        """End a process whose job is another runner's now."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process.close()
        self._job = self._process = None

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
                    self._jobs.restore(job)
                    file.parent.rename(self._directories / job.id)
                    (self._directories / job.id / file.name).unlink()
