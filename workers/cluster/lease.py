"""One process of a cluster at a time. The cluster itself ends a lease when its holder ends, however it does."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.cluster.connection import TELL_SECONDS
from workers.cluster.errors import ClusterError

logger = logging.getLogger(__name__)

NAMESPACE = "neuronlens"
"""Of the leases' names. A connection's own namespace is nobody else's."""
POLL_SECONDS = 0.25


class _Lease:
    """An actor that does nothing: its name is taken as long as it lives, and who made it takes it along."""


@contextmanager
def lease(name: str, what: str, seconds: float, away: Callable[[], bool]) -> Iterator[None]:
    """Hold the lease of that name; who comes later waits until it is free.

    Args:
        what: it is for, in words.
        seconds: that are waited at most.
        away: whether the cluster does not answer; then nobody is told that the lease is free.

    Raises:
        ClusterError: others hold it for longer than that.
    """
    # on this process' own node, so that no other node takes the lease along when it is lost
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    making = ray.remote(_Lease).options(
        name=f"lease of {name}", namespace=NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=here
    )
    began, told = time.monotonic(), False
    while True:
        try:
            held = making.remote()  # it counts from now on, though the actor starts later
            break
        except ActorAlreadyExistsError:
            waited = time.monotonic() - began
        if waited > seconds:
            raise ClusterError(f"another process has been starting or changing {what} for {seconds:.0f} s")
        if not told and waited > TELL_SECONDS:
            told = True
            logger.info("another process starts or changes %s, and is waited for", what)
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        if not away():
            with suppress(RayError):
                ray.kill(held)
