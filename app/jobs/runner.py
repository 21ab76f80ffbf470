"""Runs the jobs of one served model, one after the other, each as a process of its own (`app.jobs.process`).

Of all servers of a model on one data directory, the one that holds the runner's lock does; when it dies, another takes
over. A process whose server is gone ends by itself, and its job is started again from its checkpoint.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from filelock import FileLock, Timeout
from pydantic import ValidationError

from app.jobs.process import FitProcess, alive, discard, kill_left, result_of
from app.jobs.records import FitJob, FitJobs
from app.jobs.requests import DataRefused, DataUnusable, FitIn
from app.settings import Settings
from range_store.atomic_files import make_private_directory
from range_store.domain.range_set import check_dtype
from range_store.errors import RangeStoreError, StoreUnavailable
from range_store.formatting import format_count
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Processes of one job at most, where they are killed, or the store or the server goes away under them."""
POLL_RUNNING, POLL_IDLE = 0.2, 2.0
"""Seconds between two looks; a job that this server takes is seen at once."""
TELL_EVERY = 1.0
PATIENCE = 15.0
"""Seconds for a process to end in order before it is killed."""
PAUSE = 5.0
"""Seconds before another attempt, and that again for each one before."""
UNREACHABLE = 3
"""Exit code of the command if the store is away, or refuses."""
MAY_PASS = ("cannot be reached", "does not answer", "still loading")
"""In what it then says, where another attempt may do better."""


class FitRunner:
    """A thread that starts, watches and ends fits.

    Args:
        model: the checkpoint. dtype: the type that it is served in, and so fitted in.

    Attributes:
        listeners: told of a job when its state is another one, and every second while it runs; on the runner's thread,
            so they must not wait. What other servers of the data directory do with jobs they are told two seconds late.
    """

    def __init__(
        self,
        jobs: FitJobs,
        settings: Settings,
        model: str,
        dtype: str,
        store: RangeStore,
        mirror: Mirror,
    ) -> None:
        self._jobs, self._settings, self._model, self._dtype = jobs, settings, model, dtype
        self._store, self._mirror = store, mirror
        self.listeners: list[Callable[[FitJob], None]] = []
        self._lock = FileLock(jobs.runner_lock, timeout=0, thread_local=False)
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fits")
        self._under_way: tuple[FitJob, FitProcess] | None = None
        self._told_to_end: float | None = None
        self._looked = self._told = self._heard = 0.0
        self._known: dict[str, FitJob] = {}
        self._not_before: dict[str, float] = {}
        self._left_since: dict[str, float] = {}

    def start(self) -> None:
        self._thread.start()

    @property
    def runs(self) -> bool:
        """Whether this process is the one that runs the jobs."""
        return self._lock.is_locked

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def close(self) -> None:
        """Stop. A fit under way ends, keeps its checkpoint, and goes on with the next server."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        woken = True
        try:
            while not self._stopping.is_set():
                try:
                    if self._mine():
                        self._look(woken)
                    if time.monotonic() - self._heard > POLL_IDLE:
                        self._hear()
                except Exception as error:  # a full disk must not end it for good
                    logger.error("fits: %s: %s; trying again", type(error).__name__, error)
                woken = self._wake.wait(POLL_RUNNING if self._under_way or self._left_since else POLL_IDLE)
                self._wake.clear()
        finally:
            try:
                self._put_aside()
            finally:
                self._lock.release(force=True)

    def _mine(self) -> bool:
        if self._lock.is_locked:
            return True
        make_private_directory(self._jobs.directory)
        with suppress(Timeout):
            self._lock.acquire()
            self._jobs.forget_old()
        return self._lock.is_locked

    def _look(self, woken: bool) -> None:
        if self._under_way is None:
            self._next()
            return
        job, process = self._under_way
        if woken or time.monotonic() - self._looked > POLL_IDLE:
            self._looked = time.monotonic()
            for waiting in self._jobs.list():
                if waiting.state == "cancelling" and waiting.id != job.id:
                    self._over(waiting, state="cancelled")
        code = process.ended()
        if code is not None:
            self._finish(job, process, code)
            self._wake.set()
        elif self._told_to_end is None and self._cancelled(job):
            self._told_to_end = time.monotonic()
            self._changed(job.model_copy(update={"state": "cancelling"}))
            process.end()
        elif self._told_to_end is not None and time.monotonic() - self._told_to_end > PATIENCE:
            process.kill()
        elif time.monotonic() - self._told > TELL_EVERY:
            self._changed(job)

    def _next(self) -> None:
        """Start what was under way when its server ended, else the oldest that waits."""
        pending = [job for job in reversed(self._jobs.list()) if not job.over]
        for job in sorted(pending, key=lambda job: job.pid is None):
            if self._outlives_its_server(job):
                return
            if job.pid is not None and (result := result_of(self._jobs.place(job.id))) is not None:
                self._published(job, result)  # its server did not live to see it
            elif job.state == "cancelling":
                self._over(job, state="cancelled")
            elif time.monotonic() >= self._not_before.get(job.id, 0.0):
                self._start(job)
                return

    def _outlives_its_server(self, job: FitJob) -> bool:
        """Whether a process of it still runs; one that does not end by itself is killed."""
        if not alive(self._jobs.place(job.id)):
            self._left_since.pop(job.id, None)
            return False
        since = self._left_since.setdefault(job.id, time.monotonic())
        if time.monotonic() - since > PATIENCE and job.pid is not None:
            kill_left(job.pid)
        return True

    def _start(self, job: FitJob) -> None:
        if job.fingerprint != self._jobs.fingerprint:
            self._over(job, state="failed", error="the server has another model of this name now")
            return
        if job.attempts >= ATTEMPTS:
            why = job.error or "the server ended while it ran"
            self._over(job, state="failed", error=f"given up after {format_count(job.attempts, 'attempt')}: {why}")
            return
        place = self._jobs.place(job.id)
        try:
            request = FitIn.model_validate(job.request)
            process = FitProcess.start(place, request, self._settings, self._model, self._dtype, self._jobs.model)
        except (DataRefused, DataUnusable) as error:
            self._over(job, state="failed", error=str(error))
            return
        except ValidationError:
            self._over(job, state="failed", error="this version of the server does not know all that was asked")
            return
        now = {"state": "running", "attempts": job.attempts + 1, "pid": process.pid}
        job = job.model_copy(update=now | {"started_at": job.started_at or time.time()})
        self._under_way, self._told_to_end = (job, process), None
        self._keep(job)
        logger.info("fit %s: started, process %d, attempt %d", job.id, process.pid, job.attempts)

    def _finish(self, job: FitJob, process: FitProcess, code: int) -> None:
        process.close()
        self._under_way = None
        result = result_of(self._jobs.place(job.id))
        complaint = process.complaint()
        if result is not None:
            self._published(job, result)
        elif self._cancelled(job):
            self._over(job, state="cancelled")
        elif code < 0 or (code == UNREACHABLE and any(words in complaint for words in MAY_PASS)):
            why = complaint or f"its process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
            self._not_before[job.id] = time.monotonic() + PAUSE * job.attempts
            logger.warning("fit %s: attempt %d ended: %s", job.id, job.attempts, why)
            self._keep(job.model_copy(update={"state": "queued", "pid": None, "error": why, "exit_code": code}))
        else:
            if "ACL" in complaint:
                complaint += "; NEURONLENS_FIT_REDIS_USERNAME and …_PASSWORD name one for fits"
            self._over(job, state="failed", error=complaint or f"its process ended with code {code}", exit_code=code)

    def _published(self, job: FitJob, result: dict[str, object]) -> None:
        """The range set is in the store; make it the active one, if that was asked for and not taken back."""
        range_set = str(result["id"])
        job = job.model_copy(update={"range_set": range_set, "error": None, "exit_code": 0})
        request = FitIn.model_validate(job.request)
        if request.activate and not self._cancelled(job):
            try:
                if not request.force:
                    check_dtype(self._store.provenance(range_set), (self._dtype,))
                state = self._store.activate(range_set, request.force, None, job.by, request.reason)
                job = job.model_copy(update={"generation": state.generation})
                with suppress(StoreUnavailable):
                    self._mirror.refresh()
            except RangeStoreError as error:
                said = f"range set {range_set} is published, but not active: {error}"
                self._over(job, state="failed", error=said)
                return
        self._over(job, state="done")

    def _over(self, job: FitJob, **update: object) -> None:
        job = job.model_copy(update={"pid": None, "ended_at": time.time(), **update})
        self._keep(job)
        discard(self._jobs.place(job.id))
        self._not_before.pop(job.id, None)
        self._left_since.pop(job.id, None)
        self._jobs.forget_old()
        said = f"range set {job.range_set}" if job.state == "done" else job.error or ""
        logger.info("fit %s: %s%s", job.id, job.state, f": {said}" if said else "")

    def _keep(self, job: FitJob) -> None:
        self._jobs.write(job)
        self._changed(job)

    def _changed(self, job: FitJob) -> None:
        self._told = time.monotonic()
        self._tell(job)

    def _tell(self, job: FitJob) -> None:
        self._known[job.id] = job
        for listener in tuple(self.listeners):
            listener(job)

    def _hear(self) -> None:
        """Tell of what other servers of this data directory did with jobs."""
        self._heard = time.monotonic()
        mine = self._under_way[0].id if self._under_way else None
        jobs = self._jobs.list()
        for job in reversed(jobs):
            if job.id != mine and (job.state == "running" or self._known.get(job.id) != job):
                self._tell(job)
        self._known = {job.id: job for job in jobs}

    def _cancelled(self, job: FitJob) -> bool:
        return (self._jobs.place(job.id) / "cancel").exists()

    def _put_aside(self) -> None:
        """End the fit under way, so that the next server goes on with it; that is no failed attempt."""
        if self._under_way is None:
            return
        job, process = self._under_way
        process.end()
        if not process.wait(PATIENCE):
            process.kill()
            process.wait(PATIENCE)
        process.close()
        self._under_way = None
        result = result_of(self._jobs.place(job.id))
        if result is not None:
            self._published(job, result)
        else:
            self._keep(job.model_copy(update={"state": "queued", "pid": None, "attempts": job.attempts - 1}))
