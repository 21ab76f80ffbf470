"""A connection to a Ray cluster, private or at an address, and a watch over it. Does not load torch."""

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from workers.cluster.errors import ClusterUnavailable, first_line

logger = logging.getLogger(__name__)

PRIVATE = "local"
"""Address of a private cluster, which starts on this machine and ends with the work."""
OBJECT_STORE_BYTES = 1 << 30
"""Shared memory of a private cluster for results in transit. Ray writes what exceeds it to disk."""
KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 600_000}
"""Ray configuration of a private cluster: keep idle processes, which every pass over the texts would start again."""
CONNECT_SECONDS = 3.0
"""Timeout of a connection attempt. Ray itself tries for four minutes, without saying why."""
CHECK_SECONDS = 1.0
"""Time between two checks of the cluster."""
HEAD_MARGIN_SECONDS = 20.0
"""The head counts as lost this long before Ray would end this process."""
WARN_SECONDS = 15.0
"""A wait for resources or for another process is logged once it has taken this long."""


@contextmanager
def connected(
    address: str, cpus: int = 0, object_store: int = OBJECT_STORE_BYTES, on_lost: Callable[[str], None] | None = None
) -> Iterator["ClusterWatch | None"]:
    """Connect to a cluster. An existing connection of this process is used, and stays open.

    Args:
        address: `PRIVATE`, "auto" or "host:port".
        cpus: minimum number of CPUs that a private cluster offers.
        object_store: size of a private cluster's object store, in bytes.
        on_lost: called once, from another thread, with the reason why the cluster is lost; None: no watch.

    Raises:
        ClusterUnavailable: there is no cluster at the address.
    """
    watch: ClusterWatch | None = None
    with ExitStack() as stack:
        if not ray.is_initialized():
            _check_reachable(address)
            options: dict[str, Any] = {"address": address}
            if address == PRIVATE:
                directory = tempfile.mkdtemp(prefix="neuronlens-", dir="/tmp")  # paths of sockets must be short
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
                options |= {"object_store_memory": object_store, "_system_config": KEEP_WORKERS, "_temp_dir": directory}
            # a shutdown waits for the cluster; the processes of a private one die with this process
            stack.callback(lambda: None if watch is not None and watch.unreachable else ray.shutdown())
            _connect(options)
        if on_lost is not None:
            watch = stack.enter_context(closing(ClusterWatch(on_lost)))
        yield watch


def _connect(options: dict[str, Any]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        raise ClusterUnavailable(
            f"no Ray cluster at {options['address']!r} that this machine is part of: {first_line(error)}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray replaces them by its own
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Raises ClusterUnavailable if nothing listens at "host:port"."""
    if ":" not in address or not address.rpartition(":")[2].isdigit():
        return
    try:
        _open_connection(address)
    except OSError as error:
        raise ClusterUnavailable(f"no Ray cluster at {address}: {error.strerror or error}") from None


def _open_connection(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def own_node() -> dict[str, Any]:
    """Ray's description of the node through which this process is connected."""
    node_id = ray.get_runtime_context().get_node_id()
    return next(node for node in ray.nodes() if node["NodeID"] == node_id)


def free_resources() -> str:
    """The free CPUs and GPUs of all nodes together, in words. No single node need have that much."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free on all nodes together"


def head_seconds() -> float:
    """How long the head may be unreachable. Replicas answer meanwhile, and a head with its state in Redis returns."""
    ray_waits = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 (Ray's own name)
    return max(1.0, ray_waits - HEAD_MARGIN_SECONDS)


class ClusterWatch:
    """Watches the cluster from a thread, until it is closed.

    A program belongs to a cluster through a node on its own machine, and that node through the head. Ray 2.60 offers no
    callback for the loss of either: without its node a program continues until it sends something large, and without
    the head for a minute; then Ray ends the process amid its requests. So both are watched here, without Ray.

    Args:
        on_lost: called once, from the thread, with the reason why the cluster is lost.
    """

    def __init__(self, on_lost: Callable[[str], None]) -> None:
        self.unreachable = False
        """Whether the head does not answer, or the cluster is lost: calls to Ray may then block for long."""
        self._on_lost = on_lost
        self._closed = threading.Event()
        self._head = ray.get_runtime_context().gcs_address
        self._node = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._node.connect(own_node()["RayletSocketName"])
        self._node.settimeout(CHECK_SECONDS)
        threading.Thread(target=self._run, name="cluster-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        with suppress(OSError):
            self._node.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        with self._node:
            reason = self._wait_until_lost()
        if not self._closed.is_set():
            self.unreachable = True
            self._on_lost(reason)

    def _wait_until_lost(self) -> str:
        """Returns the reason, or any text once the watch is closed."""
        last_seen = time.monotonic()
        while not self._node_ended():
            try:
                _open_connection(self._head)
            except OSError:
                missing = time.monotonic() - last_seen
                if missing > head_seconds():
                    return f"the head of the Ray cluster, {self._head}, has not answered for {missing:.0f} s"
                if not self.unreachable:
                    message = "the head of the Ray cluster, %s, does not answer; engines continue for up to %g s"
                    logger.warning(message, self._head, head_seconds())
                self.unreachable = True
            else:
                if self.unreachable:
                    logger.warning("the head of the Ray cluster, %s, answers again", self._head)
                self.unreachable, last_seen = False, time.monotonic()
        return "the Ray node of this machine has ended"

    def _node_ended(self) -> bool:
        """Wait for `CHECK_SECONDS`, or until the node or `close` closes the connection, which carries no data."""
        try:
            return self._node.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True
