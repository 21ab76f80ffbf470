"""The thread in which a replica reports its generation: beside the mirror, so that neither waits for the other."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from range_store.domain.live import LiveState
from range_store.errors import RangeStoreError, StoreUnavailable
from range_store.storage.replicas import HEARTBEAT_SECONDS, SILENT_SECONDS, ReplicaRegistry

log = logging.getLogger(__name__)


class Heartbeat:
    """Reports what `current` gives, at once when woken and every second, until it withdraws.

    Args:
        name: of this replica; see `range_store.storage.replicas.new_replica_name`.
        current: the live state that requests are admitted under from now on; None before the first.
        read: reads the live state; called before a report that comes so late that others may have given up this one.
    """

    def __init__(
        self,
        replicas: ReplicaRegistry,
        name: str,
        current: Callable[[], LiveState | None],
        read: Callable[[], object],
    ) -> None:
        self.name = name
        self.live = 0
        """How many replicas of the model reported, at this one's last report; 0 while it cannot report."""
        self.metrics: str | None = None
        """`host:port` where this replica serves its own metrics, if it does; set before the first report."""
        self.dtype: str | None = None
        """Type of the model's parameters; set before the first report."""
        self._replicas = replicas
        self._current = current
        self._read = read
        self._reporting = threading.Lock()  # an older report never overwrites a newer one
        self._wakes: SimpleQueue[bool] = SimpleQueue()  # unlike other ways to wake, safe in a signal handler
        self._withdrawn = False
        self._heard_at: float | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="neuronlens-heartbeat", daemon=True)

    @property
    def withdrawn(self) -> bool:
        """Whether nobody is to wait for this replica any more."""
        return self._withdrawn

    @property
    def lapsed(self) -> bool:
        """Whether others may have given up this replica, so that it must read before it admits.

        Not while reports are known to fail: without Redis the last snapshot goes on answering (DESIGN promise 5).
        """
        heard = self._heard_at
        told = heard is not None and not (self._failing or self._withdrawn)
        return told and heard is not None and time.monotonic() - heard > SILENT_SECONDS

    def start(self) -> None:
        """Report from now on."""
        self._thread.start()

    def wake(self) -> None:
        """Report at once."""
        self._wakes.put(True)

    def withdraw(self) -> None:
        """Take the report out, and make no more: this replica takes no requests any more. Does not wait."""
        self._withdrawn = True
        self._wakes.put(False)

    def close(self) -> None:
        """Withdraw, and wait until that is done or has failed."""
        self.withdraw()
        if self._thread.is_alive():
            self._thread.join()
        elif self._heard_at is not None:
            self._take_out()

    def report(self) -> None:
        """Report now. Never raises: who cannot report is forgotten by and by, and answers all the same."""
        if self.lapsed:  # else this report would hide that what it tells of was given up
            with suppress(RangeStoreError):
                self._read()
        self.tell()

    def tell(self) -> None:
        """Report what was just read."""
        with self._reporting:
            if self._withdrawn:
                return
            began = time.monotonic()
            state = self._current()
            try:
                self.live = self._replicas.report(
                    self.name,
                    state.generation if state else None,
                    state.range_set if state else None,
                    metrics=self.metrics,
                    dtype=self.dtype,
                )
            except StoreUnavailable as error:
                self.live = 0
                if not self._failing:
                    log.warning("replica %s cannot report, and is not waited for: %s", self.name, error)
                self._failing = True
            else:
                self._heard_at, self._failing = began, False

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            try:
                self.report()
            except Exception:
                log.exception("replica %s stumbled over its report, and goes on", self.name)
            try:
                goes_on = self._wakes.get(timeout=HEARTBEAT_SECONDS)
                while goes_on:  # several wakes cost one report
                    goes_on = self._wakes.get_nowait()
            except Empty:
                pass
        self._take_out()

    def _take_out(self) -> None:
        with self._reporting:
            self.live = 0
            try:
                self._replicas.remove(self.name)
            except StoreUnavailable:
                log.info("replica %s could not take its report out; it expires by itself", self.name)
