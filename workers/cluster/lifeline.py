"""Whether the cluster that this process is connected to still lives. Ray itself tells late, or never.

A program belongs to a cluster through a node on its own machine, and that node through the head. With Ray 2.60 a
program whose node ended goes on until it sends something large, and then Ray ends it; one whose head ended is ended
after a minute; either amid its requests, without a word to them. So both are watched here, without Ray.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray._private import worker as _of_ray

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the head."""
REACH_SECONDS = 3.0
"""That a connection to the head may take."""
PATIENCE_SECONDS = 20.0
"""The head is given up so long before Ray would end this process."""


def head_seconds() -> float:
    """For so long the head may be away: replicas answer meanwhile, and one that keeps its books in Redis comes back."""
    ray_waits = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 (Ray's own name)
    return max(1.0, ray_waits - PATIENCE_SECONDS)


class ClusterWatch:
    """Watches the cluster that this process is connected to, in a thread, until it is closed.

    Args:
        told: called once, in the thread, with why the cluster is lost for good.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        self.lost: str | None = None
        self.unreachable = False
        """Whether the head does not answer now, or all is lost: whoever waits for Ray may wait for long."""
        self._told = told
        self._closed = threading.Event()
        self._head = ray.get_runtime_context().gcs_address
        self._node = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._node.connect(_of_ray.global_worker.node.raylet_socket_name)
        self._node.settimeout(LOOK_SECONDS)
        self._thread = threading.Thread(target=self._watch, name="cluster-lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        with suppress(OSError):
            self._node.shutdown(socket.SHUT_RDWR)

    def _watch(self) -> None:
        with self._node:
            self._run()

    def _run(self) -> None:
        seen = time.monotonic()
        while not self._closed.is_set():
            if self._node_ended():
                self._lose("the Ray node of this machine has ended")
                return
            if self._reached():
                if self.unreachable:
                    logger.warning("the head of the Ray cluster, %s, answers again", self._head)
                seen, self.unreachable = time.monotonic(), False
                continue
            missing = time.monotonic() - seen
            if not self.unreachable:
                self.unreachable = True
                most = head_seconds()
                logger.warning(
                    "the head of the Ray cluster, %s, does not answer; engines do, for %g s", self._head, most
                )
            if missing > head_seconds():
                self._lose(f"the head of the Ray cluster, {self._head}, has not answered for {missing:.0f} s")
                return

    def _node_ended(self) -> bool:
        """Whether the node has closed the connection that nothing is said on; waits a while for it."""
        try:
            return self._node.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def _reached(self) -> bool:
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except OSError:
            return False
        return True

    def _lose(self, why: str) -> None:
        if self._closed.is_set():
            return
        self.lost, self.unreachable = why, True
        self._told(why)
