"""A connection to a Ray cluster: one at an address, or a private one on this machine. Without torch."""

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker as _of_ray
from ray.exceptions import RayError

from workers.cluster.errors import ClusterUnavailable, first_line
from workers.cluster.lifeline import ClusterWatch

PRIVATE = "local"
"""The address of a cluster that is started on this machine, and ends with the work."""
OBJECT_STORE_BYTES = 1 << 30
"""Memory that a private cluster keeps results in that are on their way; more is written to disk."""

KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 600_000}
"""Of a private cluster: each pass over the texts of a fit would else start the processes anew that read them."""
REACH_SECONDS = 3.0
"""For an address; Ray itself would try for four minutes, and say little."""
TELL_SECONDS = 15.0
"""After so long without what was asked for, it is told what is free: others may hold it."""


@contextmanager
def connected(
    address: str, cpus: int = 0, object_store: int = OBJECT_STORE_BYTES, on_lost: Callable[[str], None] | None = None
) -> Iterator[ClusterWatch | None]:
    """A connection to a cluster; one that this process has already is used, and left as it is.

    Args:
        address: `PRIVATE`, "auto" or "host:port".
        cpus: that a private cluster offers at least.
        object_store: bytes of a private cluster's.
        on_lost: told why, in a thread, when the cluster is lost for good; None: nobody watches it.

    Raises:
        ClusterUnavailable: there is none at the address.
    """
    if ray.is_initialized():
        with _watched(on_lost) as own:
            yield own
        return
    _check_reachable(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    place = tempfile.mkdtemp(prefix="neuronlens-", dir="/tmp") if address == PRIVATE else None  # sockets: a short path
    options: dict[str, Any] = {"address": address}
    watch: ClusterWatch | None = None
    if place is not None:
        options |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False, "_temp_dir": place}
        options |= {"object_store_memory": object_store, "_system_config": KEEP_WORKERS}
    try:
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            why = first_line(error)
            raise ClusterUnavailable(f"no Ray cluster at {address!r} that this machine is part of: {why}") from error
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray puts its own in their place
                signal.signal(number, handler)
        with _watched(on_lost) as watch:
            yield watch
    finally:
        if watch is None or not watch.unreachable:
            ray.shutdown()
        elif place is not None and _of_ray.global_worker.node is not None:  # to be shut down it would have to answer
            _of_ray.global_worker.node.kill_all_processes(check_alive=False, allow_graceful=False)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _watched(on_lost: Callable[[str], None] | None) -> Iterator[ClusterWatch | None]:
    if on_lost is None:
        yield None
        return
    watch = ClusterWatch(on_lost)
    try:
        yield watch
    finally:
        watch.close()


def free_resources() -> str:
    """What the cluster has free now, in words; on all nodes together, so there may be room for nothing all the same."""
    left = ray.available_resources()
    return f"{left.get('CPU', 0):g} CPUs and {left.get('GPU', 0):g} GPUs are free on all nodes together"


def _check_reachable(address: str) -> None:
    """Raises ClusterUnavailable if nobody listens at "host:port"."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        raise ClusterUnavailable(f"no Ray cluster at {address}: {error.strerror or error}") from None
