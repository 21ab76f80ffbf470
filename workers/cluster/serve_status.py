"""What Ray Serve says of fleets. Without torch.

Read from the plain data that its controller gives: `serve.status` makes objects of them, which takes longer, and fails
where another thread does the same at that moment.
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

DEPLOYMENT = "engine"


@dataclass(frozen=True)
class FleetStatus:
    """A fleet, as Serve's controller sees it.

    Attributes:
        running, wanted: how many replicas take requests, and how many are to.
        replicas, ended: ids of those that it has, and of those whose processes it has lately seen end.
        fingerprint: what its replicas are held against; None until all of them were made.
        why: the last line of what it says, which is the error's own where a replica raised one.
    """

    status: ApplicationStatus
    running: int
    wanted: int
    replicas: frozenset[str]
    ended: frozenset[str]
    fingerprint: str | None
    why: str


def fleet_status(name: str) -> FleetStatus | None:
    """Of the fleet whose application has that name; None if there is none. Raises ClusterError."""
    application = applications().get(name)
    if application is None:
        return None
    deployment = application.get("deployments", {}).get(DEPLOYMENT, {})
    replicas = deployment.get("replicas", ())
    config = deployment.get("deployment_config", {}).get("user_config") or {}
    told = str(deployment.get("message") or application.get("message") or application["status"])
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return FleetStatus(
        ApplicationStatus(application["status"]),
        sum(each["state"] == ReplicaState.RUNNING for each in replicas),
        deployment.get("target_num_replicas") or 0,
        frozenset(each["replica_id"] for each in replicas),
        frozenset(each["replica_id"] for each in deployment.get("recent_dead_replicas", ())),
        config.get("fingerprint"),
        lines[-1] if lines else str(application["status"]),
    )


def applications() -> Mapping[str, Any]:
    """All that Serve runs on the cluster that this process is connected to, by name. Raises ClusterError."""
    with said():
        client = _get_global_client(raise_if_no_controller_running=False)
        found: Mapping[str, Any] = {} if client is None else client.get_serve_details()["applications"]
    return found


@contextmanager
def said() -> Iterator[None]:
    """What Ray raises, in one line."""
    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise ClusterError(f"the cluster does not do it: {first_line(error)}") from None


class Watch:
    """Asks Serve's controller twice a second how many replicas run, how many are to, and which ended.

    Args:
        ended: told the id of each replica whose process Serve has seen end; again until it says that it is done.
    """

    SECONDS = 0.5

    def __init__(self, name: str, ended: Callable[[str], bool]) -> None:
        self._name = name
        self._ended = ended
        self._done: set[str] = set()
        self._running = self._wanted = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-watch", daemon=True)
        self._see(fleet_status(name))

    def replicas(self) -> int:
        return self._running

    def wanted(self) -> int:
        return self._wanted

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(5 * self.SECONDS)  # it may wait for a cluster that does not answer

    def _run(self) -> None:
        while not self._stopping.wait(self.SECONDS):
            try:
                self._see(fleet_status(self._name))
            except ClusterError as error:  # the controller is being replaced, as when its node is lost
                logger.warning("how many replicas run is not known: %s", error)
            except Exception:  # else what was last seen would be told for ever
                logger.exception("the fleet's watch stumbled, and goes on")

    def _see(self, status: FleetStatus | None) -> None:
        running = status.running if status is not None else 0
        if running != self._running and self._thread.is_alive():
            logger.info("replicas that run: %d, before: %d", running, self._running)
        self._running, self._wanted = running, status.wanted if status is not None else 0
        if status is not None:
            self._done &= status.ended
            self._done |= {replica for replica in status.ended - self._done if self._ended(replica)}
