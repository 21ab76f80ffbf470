"""The thread in which a replica reports its status, separate from the mirror so that neither waits for the other."""

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
    """Reports a replica's status every second, and at once after `wake`, until `withdraw`.

    Args:
        name: of this replica; see `range_store.storage.replicas.new_replica_name`.
        current: returns the live state that requests are admitted under from now on; None before the first.
        read: reads the live state; called before a report that is so late that others may have given up this replica.
    """

    def __init__(
        self,
        replicas: ReplicaRegistry,
        name: str,
        current: Callable[[], LiveState | None],
        read: Callable[[], object],
    ) -> None:
        self.name = name
        self.live_replicas = 0
        """How many replicas of the model were live at the last report; 0 while reports fail."""
        self.metrics_address: str | None = None
        """`host:port` where this replica serves its own metrics, if it does; set it before the first report."""
        self.dtype: str | None = None
        """Dtype of the model's parameters; set it before the first report."""
        self.withdrawn = False
        """Whether nobody needs to wait for this replica any more."""
        self._replicas = replicas
        self._current = current
        self._read = read
        self._reporting = threading.Lock()  # an older report must not overwrite a newer one
        self._wakes: SimpleQueue[bool] = SimpleQueue()  # unlike other primitives, safe in a signal handler
        self._reported_at: float | None = None
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="neuronlens-heartbeat", daemon=True)

    @property
    def lapsed(self) -> bool:
        """Whether others may have given up this replica, so that it must read before it admits a request.

        Not while reports are known to fail: without Redis the last snapshot stays in use.
        """
        reported_at = self._reported_at
        if reported_at is None or self._failing or self.withdrawn:
            return False
        return time.monotonic() - reported_at > SILENT_SECONDS

    def start(self) -> None:
        """Start reporting."""
        self._thread.start()

    def wake(self) -> None:
        """Report at once."""
        self._wakes.put(True)

    def withdraw(self) -> None:
        """Remove the status and stop reporting, as this replica takes no more requests. Does not wait."""
        self.withdrawn = True
        self._wakes.put(False)

    def close(self) -> None:
        """Withdraw, and wait until that is done or has failed."""
        self.withdraw()
        if self._thread.is_alive():
            self._thread.join()
        elif self._reported_at is not None:
            self._remove()

    def read_and_report(self) -> None:
        """Report; if the last report is too old, read first: a report would hide that others gave up this replica."""
        if self.lapsed:
            with suppress(RangeStoreError):
                self._read()
        self.report()

    def report(self) -> None:
        """Report what was read last. Never raises: a replica that cannot report expires, and goes on answering."""
        with self._reporting:
            if self.withdrawn:
                return
            began = time.monotonic()
            state = self._current()
            try:
                self.live_replicas = self._replicas.report(
                    self.name,
                    state.generation if state else None,
                    state.range_set if state else None,
                    metrics=self.metrics_address,
                    dtype=self.dtype,
                )
            except StoreUnavailable as error:
                self.live_replicas = 0
                if not self._failing:
                    log.warning(
                        "replica %s cannot report its status, so changes do not wait for it: %s", self.name, error
                    )
                self._failing = True
            else:
                self._reported_at, self._failing = began, False

    def _run(self) -> None:
        running = True
        while running:
            try:
                self.read_and_report()
            except Exception:
                log.exception("replica %s: unexpected error in a report; retrying", self.name)
            try:
                running = self._wakes.get(timeout=HEARTBEAT_SECONDS)
                while running:  # several wakes cost one report
                    running = self._wakes.get_nowait()
            except Empty:
                pass
        self._remove()

    def _remove(self) -> None:
        with self._reporting:
            self.live_replicas = 0
            try:
                self._replicas.remove(self.name)
            except StoreUnavailable:
                log.info("replica %s could not remove its status, which expires by itself", self.name)
