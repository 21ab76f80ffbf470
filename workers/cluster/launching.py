"""Starts a fleet on a Ray cluster with Ray Serve, or attaches to a running one. Does not load torch.

A fleet starts in two steps: replicas load and report their model; then the fleet's configuration gets the model's
fingerprint, and replicas that have it join. From then on Serve compares every new replica with that fingerprint.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.cluster.connection import WARN_SECONDS, free_resources
from workers.cluster.errors import ClusterError, OtherFleet
from workers.cluster.plan import SERVE_LOGGING, FleetPlan
from workers.cluster.replica import ReplicaInfo, ReplicaSettings
from workers.cluster.serve_status import PREFIX, FleetStatus, FleetWatch, applications, fleet_status, ray_errors
from workers.models.facts import ModelFacts

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # a command's stderr has the lines of that command only

NAMESPACE = "neuronlens"
"""Ray namespace of the locks. By default every connection has a namespace of its own."""
POLL_SECONDS = 0.25
ENOUGH_SECONDS = 60.0
"""How long a start waits for further replicas once one runs. Later ones join when they are ready."""
START_SECONDS = 900.0
"""How long a start waits for the first replica: a large model has to load, and nodes may have to be started."""
RESERVE_SECONDS = 2.0
"""How long Ray may take to reserve resources that are free."""


@dataclass(frozen=True, eq=False)
class RunningFleet:
    """A fleet that answers.

    Attributes:
        handle: handle of the Serve application.
        max_batch_tokens: of each replica's engine.
        replicas, target_replicas: return how many replicas take requests, and how many Serve aims at.
    """

    handle: Any
    facts: ModelFacts
    max_batch_tokens: int
    replicas: Callable[[], int]
    target_replicas: Callable[[], int]


@contextmanager
def running_fleet(
    plan: FleetPlan,
    *,
    redeploy: bool = False,
    keep: bool = True,
    unreachable: Callable[[], bool] = lambda: False,
    forget_replica: Callable[[str], bool] = lambda replica: True,
) -> Iterator[RunningFleet]:
    """Start the fleet of a plan, or attach to it, on the connected cluster.

    Args:
        redeploy: replace the replicas of a running fleet that has other settings, one by one.
        keep: leave the fleet running afterwards. An attached fleet is left running in any case.
        unreachable: whether the cluster does not answer; then the exit makes no calls to it.
        forget_replica: see `FleetWatch`.

    Raises:
        ClusterError: the fleet does not start.
        OtherFleet: a fleet of this name runs with other settings.
        ModelError, RangeStoreError: replicas cannot serve the checkpoint or reach the store.
    """
    _start_serve()
    started = False
    try:
        with _lock(plan, unreachable):
            if _exists(plan):
                info = _attach(plan, redeploy)
            else:
                info, started = _start(plan), True
        assert info.facts is not None
        handle = serve.get_app_handle(plan.name)
        watch = FleetWatch(plan.name, forget_replica)
        watch.start()
        try:
            yield RunningFleet(handle, info.facts, info.max_batch_tokens, watch.replicas, watch.target_replicas)
        finally:
            watch.stop()
            if not unreachable():
                handle.shutdown()
    finally:
        if started and not keep and not unreachable():
            with suppress(RayError, RayServeException):
                serve.delete(plan.name)


def fleet_names() -> list[str]:
    """The models that have a fleet on the connected cluster."""
    return sorted(name.removeprefix(PREFIX) for name in applications() if name.startswith(PREFIX))


def delete_fleet(name: str) -> None:
    """Stop a fleet after its replicas have answered their requests. Raises ClusterError: there is none of this name."""
    if name not in fleet_names():
        raise ClusterError(f"no fleet serves {name!r} on this cluster; it has: {', '.join(fleet_names()) or 'none'}")
    with ray_errors():
        serve.delete(PREFIX + name)


def _start_serve() -> None:
    options: dict[str, Any] = {"http_options": {"location": "NoServer"}, "logging_config": SERVE_LOGGING}
    try:
        serve.start(**options)
    except ActorAlreadyExistsError:  # another process started it at the same moment
        serve.start(**options)


class _Lock:
    """An actor that does nothing. Its name is taken as long as its owner lives."""


@contextmanager
def _lock(plan: FleetPlan, unreachable: Callable[[], bool]) -> Iterator[None]:
    """Let one process at a time start or change the fleet: two would undo each other's steps.

    Ray has no lock, but names of actors are unique, and an actor ends with its owner, however that ends.
    """
    # on this process's own node, so that the loss of another node does not release the lock
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Lock).options(
        name=f"lock of {plan.name}", namespace=NAMESPACE, num_cpus=0, max_restarts=-1, scheduling_strategy=here
    )
    for _ in _polling(lambda: f"waiting for another process that starts or changes {plan.title}"):
        try:
            lock = actor.remote()  # takes the name at once, though the actor starts later
            break
        except ActorAlreadyExistsError:
            continue
    else:
        raise ClusterError(f"another process has been starting or changing {plan.title} for {START_SECONDS:.0f} s")
    try:
        yield
    finally:
        if not unreachable():
            with suppress(RayError):
                ray.kill(lock)


def _polling(warning: Callable[[], str | None]) -> Iterator[float]:
    """Yields the seconds waited so far at every `POLL_SECONDS`, until `START_SECONDS` are over.

    Args:
        warning: returns a message that is logged once after `WARN_SECONDS`, or None as long as there is none.
    """
    began, warned = time.monotonic(), False
    while (waited := time.monotonic() - began) <= START_SECONDS:
        yield waited
        if not warned and waited > WARN_SECONDS and (message := warning()) is not None:
            warned = True
            logger.warning(message)
        time.sleep(POLL_SECONDS)


def _exists(plan: FleetPlan) -> bool:
    """Whether the fleet was started completely. Waits for the end of one that is being stopped."""
    for _ in _polling(lambda: f"waiting until {plan.title} has stopped"):
        status = fleet_status(plan.name)
        if status is None or status.status != ApplicationStatus.DELETING:
            return status is not None and status.fingerprint is not None
    raise ClusterError(f"{plan.title} is being stopped, and has not ended after {START_SECONDS:.0f} s")


def _start(plan: FleetPlan) -> ReplicaInfo:
    """Start a new fleet. If that fails, nothing of it is left."""
    replicas = plan.replicas or 1
    try:
        _deploy(plan, replicas, None)
        _wait_running(plan, replicas)
        info = _replica_info(plan)
        fingerprint = _checked(info).identity.fingerprint
        _deploy(plan, replicas, fingerprint)
        _wait_running(plan, replicas)
    except BaseException:
        with suppress(RayError, RayServeException):
            serve.delete(plan.name, _blocking=False)
        raise
    return info


def _attach(plan: FleetPlan, redeploy: bool) -> ReplicaInfo:
    """Attach to the running fleet, and change its number of replicas or its settings if the plan says so."""
    _wait_running(plan, 1, settled=False)
    info = _replica_info(plan)
    if info.facts is None:
        raise ClusterError(f"{plan.title} has not started correctly: stop it with `neuronlens fleet down`")
    fingerprint = info.facts.identity.fingerprint
    gpus = float(info.facts.device.startswith("cuda"))
    if plan.with_threads is not None and info.settings.threads is not None:
        plan = plan.with_threads(info.settings.threads)
    if redeploy:
        _try_checkpoint(plan, fingerprint)
    changed = [
        each.name
        for each in fields(ReplicaSettings)
        if getattr(info.settings, each.name) != getattr(plan.settings, each.name)
    ]
    if changed and not redeploy:
        raise OtherFleet(
            f"{plan.title} runs already, with other settings ({', '.join(changed)}): leave them as they are, pass "
            "--redeploy to replace its replicas one by one, or choose another --name"
        )
    status = fleet_status(plan.name)
    replicas = plan.replicas or max(1, status.running if status is not None else 0)
    if changed:
        before = replace(plan, settings=info.settings, cpus=info.settings.threads or plan.cpus, gpus=gpus)
        _deploy(plan, replicas, fingerprint)
        try:
            return _wait_replaced(plan)
        except ClusterError:
            _deploy(before, replicas, fingerprint)  # so that a replica that ends is replaced by one that works
            raise
    if plan.replicas is not None or plan.max_replicas is not None:
        plan = replace(plan, gpus=gpus)  # the plan counts on GPUs if the cluster has got its first one since
        _deploy(plan, replicas, fingerprint)
        _wait_running(plan, plan.replicas or 1)
    return info


def _load_once(replica_class: type[Any], *arguments: Any) -> ReplicaInfo:
    """A Ray task: what a replica with these arguments loads."""
    info: ReplicaInfo = asyncio.run(replica_class(*arguments).info())
    return info


def _try_checkpoint(plan: FleetPlan, fingerprint: str) -> None:
    """Load the plan's checkpoint once on some node, on its CPU, before any replica is replaced.

    Raises:
        OtherFleet: it has another fingerprint: the range sets and live erasures of this name would not fit it.
        ModelError, RangeStoreError: it cannot be served.
        ClusterError: the node was lost, or loading takes too long.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    model = {**plan.settings.model, "device": "cpu", "dtype": "auto", "compiled": False}
    node = NodeAffinitySchedulingStrategy(nodes[0], soft=False) if nodes else "DEFAULT"
    # `max_calls`: the process ends with the task, so the model does not stay in memory
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1, scheduling_strategy=node)(_load_once)
    loading = task.remote(plan.replica_class, replace(plan.settings, model=model), *plan.replica_args)
    with ray_errors():
        info: ReplicaInfo = ray.get(loading, timeout=START_SECONDS)
    facts = _checked(info)
    if facts.identity.fingerprint != fingerprint:
        raise OtherFleet(
            f"{plan.title} serves another checkpoint than {facts.source}, and keeps it, with its range sets and live "
            "erasures: serve this one under another --name"
        )


def _checked(info: ReplicaInfo) -> ModelFacts:
    """The facts of a replica's model. Raises the replica's error if it could not load it."""
    if info.failure is not None:
        raise info.failure.unpack()
    assert info.facts is not None
    return info.facts


def _wait_replaced(plan: FleetPlan) -> ReplicaInfo:
    """Wait until all replicas have the plan's settings.

    Raises:
        ClusterError: Serve gave up, or it takes too long. The replicas that were not replaced continue.
    """
    for _ in _polling(lambda: f"replicas are still being replaced; {free_resources()}"):
        status = fleet_status(plan.name)
        if status is None or status.status == ApplicationStatus.DEPLOY_FAILED:
            break
        if status.status == ApplicationStatus.RUNNING and (info := _replica_info(plan)).settings == plan.settings:
            return info
    raise ClusterError(
        f"replicas with these settings do not start, and those that are left continue: {_reason(status)}"
    )


def _wait_running(plan: FleetPlan, replicas: int, settled: bool = True) -> None:
    """Wait until that many replicas run, or one does and the others take longer than `ENOUGH_SECONDS`.

    Args:
        settled: Serve must also have applied its latest configuration.

    Raises:
        ClusterError: Serve gave up, or no replica runs in time.
    """

    def warning() -> str | None:
        if status is None or not status.unplaced:
            return None
        each = f"{plan.cpus:g} CPUs" + (" and a GPU" if plan.gpus else "")
        waiting = f"{status.running} of {replicas} replicas run, others wait for resources"
        return f"{waiting}: each needs {each}, {free_resources()}"

    for waited in _polling(warning):
        if (status := fleet_status(plan.name)) is None:
            continue
        # a fleet that lost a replica is unhealthy until another has taken its place
        done = not settled or status.status in (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY)
        if (status.running >= replicas and done) or (status.running and waited > ENOUGH_SECONDS):
            return
        if status.status == ApplicationStatus.DEPLOY_FAILED and not status.running:
            raise ClusterError(f"{plan.title} does not start: {status.message}")
    raise ClusterError(f"no replica of {plan.title} started within {START_SECONDS:.0f} s: {_reason(status)}")


def _reason(status: FleetStatus | None) -> str:
    return status.message if status is not None else "Serve does not know the fleet"


def _deploy(plan: FleetPlan, replicas: int, fingerprint: str | None) -> None:
    application = plan.application(replicas, fingerprint, surge=_has_room(plan))
    with ray_errors():
        serve.run_many(
            [serve.RunTarget(application, name=plan.name, route_prefix=None)], wait_for_applications_running=False
        )


def _has_room(plan: FleetPlan) -> bool:
    """Whether some node has the resources of one more replica free.

    Found by reserving them for a moment: the public API of Ray tells free resources of all nodes together only.
    """
    group = placement_group([{"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}])
    try:
        return bool(group.wait(RESERVE_SECONDS))
    finally:
        remove_placement_group(group)


def _replica_info(plan: FleetPlan) -> ReplicaInfo:
    with ray_errors():
        info: ReplicaInfo = serve.get_app_handle(plan.name).info.remote().result(timeout_s=60)
    return info
