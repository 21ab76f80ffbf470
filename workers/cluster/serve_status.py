"""What Ray Serve reports of fleets. Does not load torch.

`serve.status` lacks the ids of replicas, those that ended, and the configuration that is applied. So this reads the
details that Serve's controller gives to its dashboard.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ReplicaState

from workers.cluster.errors import ClusterError, first_line

logger = logging.getLogger(__name__)

PREFIX = "neuronlens:"
"""The Serve application of a model has its name with this prefix."""
DEPLOYMENT = "engine"
"""The one deployment of each application."""


@dataclass(frozen=True)
class FleetStatus:
    """A fleet, as Serve's controller sees it.

    Attributes:
        running, target: how many replicas take requests, and how many Serve aims at.
        unplaced: how many replicas wait for a node with free resources.
        replicas, ended: ids of the current replicas, and of those whose processes ended lately.
        fingerprint: of the model that replicas must have; None until the fleet has started completely.
        message: the last line of Serve's message: the error's own, if a replica raised one.
    """

    status: ApplicationStatus
    running: int
    target: int
    unplaced: int
    replicas: frozenset[str]
    ended: frozenset[str]
    fingerprint: str | None
    message: str


def fleet_status(name: str) -> FleetStatus | None:
    """The status of the fleet with this application name; None if there is none. Raises ClusterError."""
    application = applications().get(name)
    if application is None:
        return None
    deployment = application.get("deployments", {}).get(DEPLOYMENT, {})
    replicas = deployment.get("replicas", ())
    config = deployment.get("deployment_config", {}).get("user_config") or {}
    message = str(deployment.get("message") or application.get("message") or application["status"])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    starting = [each for each in replicas if each["state"] == ReplicaState.STARTING]
    return FleetStatus(
        ApplicationStatus(application["status"]),
        sum(each["state"] == ReplicaState.RUNNING for each in replicas),
        deployment.get("target_num_replicas") or 0,
        sum(each.get("node_id") is None for each in starting),
        frozenset(each["replica_id"] for each in replicas),
        frozenset(each["replica_id"] for each in deployment.get("recent_dead_replicas", ())),
        config.get("fingerprint"),
        lines[-1] if lines else str(application["status"]),
    )


def applications() -> Mapping[str, Any]:
    """Details of all applications on the connected cluster, by name. Raises ClusterError."""
    with ray_errors():
        client = _get_global_client(raise_if_no_controller_running=False)
        found: Mapping[str, Any] = {} if client is None else client.get_serve_details()["applications"]
    return found


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn errors of Ray into a ClusterError of one line."""
    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise ClusterError(f"a call to the cluster failed: {first_line(error)}") from None


class FleetWatch:
    """Polls the status of a fleet from a thread.

    Args:
        forget_replica: called with the id of each replica whose process ended, again and again until it returns True.
    """

    SECONDS = 0.5

    def __init__(self, name: str, forget_replica: Callable[[str], bool]) -> None:
        self._name = name
        self._forget_replica = forget_replica
        self._forgotten: set[str] = set()
        self._running = self._target = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-watch", daemon=True)
        self._update()

    def replicas(self) -> int:
        """How many replicas take requests."""
        return self._running

    def target_replicas(self) -> int:
        """How many replicas Serve aims at."""
        return self._target

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(5 * self.SECONDS)  # it may be waiting for a cluster that does not answer

    def _run(self) -> None:
        while not self._stopping.wait(self.SECONDS):
            try:
                self._update()
            except ClusterError as error:  # for example while the controller moves from a lost node to another
                logger.warning("the number of running replicas is unknown: %s", error)
            except Exception:  # the thread must go on, or its last numbers would be reported for ever
                logger.exception("the fleet's status could not be read; trying again")

    def _update(self) -> None:
        status = fleet_status(self._name)
        running = status.running if status is not None else 0
        if running != self._running and self._thread.is_alive():
            logger.info("running replicas: %d, before: %d", running, self._running)
        self._running, self._target = running, status.target if status is not None else 0
        ended = status.ended if status is not None else frozenset()
        self._forgotten &= ended
        self._forgotten |= {replica for replica in ended - self._forgotten if self._forget_replica(replica)}
