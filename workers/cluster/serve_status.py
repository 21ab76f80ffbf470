"""What Ray Serve says of a fleet. Without torch."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState, ServeInstanceDetails

from workers.cluster.errors import ClusterError

logger = logging.getLogger(__name__)

DEPLOYMENT = "engine"


def status_of(name: str) -> Any:
    with said():
        return serve.status().applications.get(name)


def count(status: Any) -> int:
    deployment = status.deployments.get(DEPLOYMENT)
    return deployment.replica_states.get(ReplicaState.RUNNING, 0) if deployment else 0


def running_replicas(name: str) -> int:
    status = status_of(name)
    return count(status) if status is not None else 0


def reason(status: Any) -> str:
    """The last line of what Serve says, which is the error's own where a replica raised one."""
    deployment = status.deployments.get(DEPLOYMENT)
    said = (deployment.message if deployment else "") or status.message or status.status
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[-1] if lines else str(status.status)


@contextmanager
def said() -> Iterator[None]:
    """What Ray raises, in one line."""
    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        lines = str(error).strip().splitlines()
        raise ClusterError(f"the cluster does not do it: {lines[0] if lines else type(error).__name__}") from None


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
        self._running, self._wanted = self._numbers(details_of(name))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-watch", daemon=True)

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
                deployment = details_of(self._name)
            except ClusterError as error:  # the controller is being replaced, as when its node is lost
                logger.warning("how many replicas run is not known: %s", error)
                continue
            now, self._wanted = self._numbers(deployment)
            if deployment is not None:
                self._tell({each.replica_id for each in deployment.recent_dead_replicas})
            if now != self._running:
                logger.info("replicas that run: %d, before: %d", now, self._running)
                self._running = now

    @staticmethod
    def _numbers(deployment: Any) -> tuple[int, int]:
        if deployment is None:
            return 0, 0
        running = sum(each.state == ReplicaState.RUNNING for each in deployment.replicas)
        return running, deployment.target_num_replicas

    def _tell(self, dead: set[str]) -> None:
        self._done &= dead
        for replica in dead - self._done:
            if self._ended(replica):
                self._done.add(replica)


def details_of(name: str) -> Any:
    """Everything of a fleet's deployment, or None: what `serve.status` reads, and leaves most of out."""
    with said():
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            return None
        application = ServeInstanceDetails(**client.get_serve_details()).applications.get(name)
    return application.deployments.get(DEPLOYMENT) if application is not None else None
