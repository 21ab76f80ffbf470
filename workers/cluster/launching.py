"""Puts a fleet on a Ray cluster with Ray Serve, or finds the one that is there. Without torch.

Started in two steps: replicas are made and tell which model they loaded; then the fleet is told its fingerprint, and
who has it joins. From then on Serve holds every new replica, however late, against that fingerprint. One process at a
time starts or changes a fleet: ingresses that are started together would undo each other's steps.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version as package_version
from typing import Any

import ray
from ray import serve
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.cluster.connection import TELL_SECONDS, free_resources
from workers.cluster.errors import ClusterError, OtherFleet
from workers.cluster.lease import lease
from workers.cluster.replica import EngineReplica, ReplicaInfo, ReplicaSettings
from workers.cluster.scaling import autoscaling
from workers.cluster.serve_status import DEPLOYMENT, Watch, applications, fleet_status, said
from workers.engine.settings import batch_tokens_for
from workers.models.facts import ModelFacts

logger = logging.getLogger(__name__)
logging.getLogger("ray.serve").setLevel(logging.WARNING)  # a command's stderr is its own

PREFIX = "neuronlens:"
"""Before a model's name, the name of its application in Serve."""
MAX_ONGOING = 1024
"""Calls that a replica takes at once. Its engine bounds what it holds, by tokens, and refuses with a time to wait; a
bound here would hold calls back in the ingress, where nobody counts them. Kept so that a fault cannot pile up more."""
MAX_QUEUED = 4096
"""Calls of one ingress that may wait until a replica is found for them, as while all are being replaced."""
HEALTH_SECONDS = 2.0
POLL_SECONDS = 0.25
ENOUGH_SECONDS = 60.0
"""When one replica is up, the others are waited for so long at most: those that come later join then."""
SURGE_PERCENT = 20
"""Of the replicas that many, and one at least, are started before as many old ones end, where there is room."""
FIRST_SECONDS = 900.0
"""How long the first replica may take: a large model is loaded, and nodes may have to be started."""


@dataclass(frozen=True)
class FleetPlan:
    """What is to run. `replicas` None: of a new fleet one, of one that runs as many as it has.

    Attributes:
        max_replicas: where it is given, Serve chooses a number up to it, by `workers.cluster.scaling`.
        scaling: how, where it differs from `workers.cluster.scaling.DEFAULTS`.
        cpus, gpus: of each replica.
        drain_seconds: that a replica which is to go has for what it holds.
        replica: the actor, made of `settings` and of `more`, in which ingresses of one fleet may differ.
        with_threads: makes this plan with another number of threads; given where the number is a default, so that a
            running fleet keeps its own.
    """

    settings: ReplicaSettings
    replicas: int | None
    max_replicas: int | None
    cpus: float
    gpus: float
    drain_seconds: float
    scaling: Mapping[str, float] = field(default_factory=dict)
    replica_class: type[Any] = EngineReplica
    replica_args: tuple[Any, ...] = ()
    with_threads: "Callable[[int], FleetPlan] | None" = None

    @property
    def name(self) -> str:
        return PREFIX + self.settings.name

    @property
    def version(self) -> str:
        """Of what a replica is made with. Serve replaces all replicas whose version is not the one it is told."""
        kind = f"{self.replica_class.__module__}.{self.replica_class.__qualname__} {package_version('neuronlens')}"
        said = json.dumps([kind, asdict(self.settings)], sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class RunningFleet:
    """A fleet that answers: a handle to it, its model, the tokens of a replica's batch, how many replicas run now, and
    how many Serve wants to.
    """

    handle: Any
    facts: ModelFacts
    max_batch_tokens: int
    replicas: Callable[[], int]
    target_replicas: Callable[[], int]


@dataclass(frozen=True)
class Capacity:
    """What a replica takes, and how many of them the cluster has room for now."""

    threads: int
    gpus: float
    replicas: int


def capacity(device: str, threads: int | None, replicas: int | None) -> Capacity:
    """What a replica takes, and how many fit: a GPU each where the cluster has any, else CPUs.

    Args:
        device: "auto" takes GPUs where the cluster has some.
        threads: of each; None: an equal share of the CPUs, or 1 where `replicas` is None.

    Raises:
        ClusterError: a GPU is wanted, and there is none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if device.startswith("cuda") and not gpus:
        raise ClusterError("no node of the cluster has a GPU: --device cpu")
    with_gpu = gpus > 0 and device in ("auto", "cuda")
    share = min(max(cpus, default=1), max(1, sum(cpus) // replicas)) if replicas else 1
    each = threads or share
    fit = gpus if with_gpu else sum(node // each for node in cpus)
    return Capacity(each, 1.0 if with_gpu else 0.0, max(1, fit))


@contextmanager
def running_fleet(
    plan: FleetPlan,
    *,
    redeploy: bool = False,
    keep: bool = True,
    unreachable: Callable[[], bool] = lambda: False,
    forget_replica: Callable[[str], bool] = lambda replica: True,
) -> Iterator[RunningFleet]:
    """The fleet of a plan: started, or the one that runs. This process is connected to the cluster.

    Args:
        redeploy: replace the replicas of a fleet that runs with other settings, one by one.
        keep: leave it running afterwards; who did not start it does in any case.
        unreachable: whether the cluster does not answer; then nobody is told that this process leaves.
        forget_replica: see `Watch`.

    Raises:
        ClusterError: it does not come up; says why.
        OtherFleet: one of that name runs with other settings.
        ModelError, RangeStoreError: what replicas say of their checkpoint or store.
    """
    _start_serve()
    started = False
    try:
        with lease(plan.name, f"the fleet of {plan.settings.name!r}", FIRST_SECONDS, unreachable):
            if _is_there(plan):
                info = _attach(plan, redeploy)
            else:
                info, started = _start(plan), True
        assert info.facts is not None
        watch = Watch(plan.name, forget_replica)
        handle = serve.get_app_handle(plan.name)
        watch.start()
        try:
            yield RunningFleet(handle, info.facts, info.max_batch_tokens, watch.replicas, watch.wanted)
        finally:
            watch.stop()
            if not unreachable():
                handle.shutdown()
    finally:
        if started and not keep and not unreachable():
            with suppress(RayError, RayServeException):
                serve.delete(plan.name)


def fleet_names() -> list[str]:
    """The models that have a fleet on the cluster that this process is connected to."""
    return sorted(name.removeprefix(PREFIX) for name in applications() if name.startswith(PREFIX))


def delete_fleet(name: str) -> None:
    """End a fleet; what its replicas hold is answered first. Raises ClusterError if there is none of that name."""
    if name not in fleet_names():
        raise ClusterError(f"no fleet serves {name!r} here; there are: {', '.join(fleet_names()) or 'none'}")
    with said():
        serve.delete(PREFIX + name)


def _start_serve() -> None:
    options: dict[str, Any] = {"http_options": {"location": "NoServer"}, "logging_config": _quiet()}
    try:
        serve.start(**options)
    except ActorAlreadyExistsError:  # another process did so at the same moment
        serve.start(**options)


def _is_there(plan: FleetPlan) -> bool:
    """Whether the fleet is there: one that goes is waited for, and one whose start nobody finished is none.

    Raises ClusterError: what goes does not end.
    """
    ends = time.monotonic() + FIRST_SECONDS
    while (status := fleet_status(plan.name)) is not None and status.status == ApplicationStatus.DELETING:
        if time.monotonic() > ends:
            raise ClusterError(f"the fleet of {plan.settings.name!r} is being taken down, and does not end")
        time.sleep(POLL_SECONDS)
    return status is not None and status.fingerprint is not None


def _start(plan: FleetPlan) -> ReplicaInfo:
    """A new fleet. Nothing of it is left if it does not come up."""
    try:
        _deploy(plan, plan.replicas or 1, None)
        _wait_running(plan, plan.replicas or 1)
        info = _replica_info(plan)
        if info.failure is not None:
            raise info.failure.error()
        assert info.facts is not None
        _deploy(plan, plan.replicas or 1, info.facts.identity.fingerprint)
        _wait_running(plan, plan.replicas or 1)
    except BaseException:
        with suppress(RayError, RayServeException):
            serve.delete(plan.name, _blocking=False)
        raise
    return info


def _attach(plan: FleetPlan, redeploy: bool) -> ReplicaInfo:
    """The fleet that runs; with the plan's number of replicas, if it has one, and its settings, if that is wanted."""
    _wait_running(plan, 1, all_of_it=False)
    info = _replica_info(plan)
    if info.facts is None:
        raise ClusterError(f"the fleet of {plan.settings.name!r} does not come up: `neuronlens fleet down` ends it")
    fingerprint = info.facts.identity.fingerprint
    gpus = float(info.facts.device.startswith("cuda"))
    if plan.with_threads is not None and info.settings.threads is not None:
        plan = plan.with_threads(info.settings.threads)
    if redeploy:
        _try_out(plan, fingerprint)
    differs = [
        each.name
        for each in fields(ReplicaSettings)
        if getattr(info.settings, each.name) != getattr(plan.settings, each.name)
    ]
    if differs and not redeploy:
        raise OtherFleet(
            f"a fleet serves {plan.settings.name!r} already, with other settings ({', '.join(differs)}): leave them as "
            "they are, pass --redeploy to replace its replicas one by one, or choose another --name"
        )
    status = fleet_status(plan.name)
    replicas = plan.replicas or max(1, status.running if status is not None else 0)
    if differs:
        before = replace(plan, settings=info.settings, cpus=info.settings.threads or plan.cpus, gpus=gpus)
        _deploy(plan, replicas, fingerprint)
        try:
            return _replaced(plan)
        except ClusterError:
            _deploy(before, replicas, fingerprint)  # else who dies now would be replaced by what does not come up
            raise
    if plan.replicas is not None or plan.max_replicas is not None:
        plan = replace(plan, gpus=gpus)  # the first node with a GPU may have come since
        _deploy(plan, replicas, fingerprint)
        _wait_running(plan, plan.replicas or 1)
    return info


class _Trial:
    """A replica in an actor. Not the actor itself: what Ray makes of a class has its `__del__`, and no fields."""

    def __init__(self, kind: type[Any], *arguments: Any) -> None:
        self._one = kind(*arguments)

    async def info(self) -> ReplicaInfo:
        told: ReplicaInfo = await self._one.info()
        return told


def _try_out(plan: FleetPlan, fingerprint: str) -> None:
    """Load the plan's checkpoint once on a node, on its CPU and beside what runs there, before a replica goes for it.

    Raises:
        OtherFleet: it has another fingerprint: ranges and live erasures of the fleet's name would not fit it.
        ModelError, RangeStoreError: it cannot be served.
        ClusterError: the node was lost, or loads for too long.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    model = {**plan.settings.model, "device": "cpu", "dtype": "auto", "compiled": False}
    somewhere = NodeAffinitySchedulingStrategy(nodes[0], soft=False) if nodes else "DEFAULT"
    one = ray.remote(_Trial).options(num_cpus=0, scheduling_strategy=somewhere)
    with said():
        made = one.remote(plan.replica_class, replace(plan.settings, model=model), *plan.replica_args)
        try:
            info: ReplicaInfo = ray.get(made.info.remote(), timeout=FIRST_SECONDS)
        finally:
            ray.kill(made)
    if info.failure is not None:
        raise info.failure.error()
    assert info.facts is not None
    if info.facts.identity.fingerprint != fingerprint:
        raise OtherFleet(
            f"the fleet of {plan.settings.name!r} serves another checkpoint than {info.facts.source}, and keeps it, "
            "with its range sets and live erasures: serve this one under another --name"
        )


def _replaced(plan: FleetPlan) -> ReplicaInfo:
    """What a replica tells, when all have the plan's settings.

    Raises:
        ClusterError: Serve gave up, or none of them was replaced in time. What ran before goes on.
    """
    began = time.monotonic()
    told = False
    while True:
        status = fleet_status(plan.name)
        waited = time.monotonic() - began
        if status is None or status.status == ApplicationStatus.DEPLOY_FAILED or waited > FIRST_SECONDS:
            why = status.why if status is not None else "Serve knows nothing of it"
            raise ClusterError(f"engines with these settings do not come up, and those that are left go on: {why}")
        if status.status == ApplicationStatus.RUNNING and (info := _replica_info(plan)).settings == plan.settings:
            return info
        if not told and waited > TELL_SECONDS:
            told = True
            logger.info("engines are still being replaced; %s", free_resources())
        time.sleep(POLL_SECONDS)


def _deploy(plan: FleetPlan, replicas: int, fingerprint: str | None) -> None:
    number: dict[str, Any] = {"num_replicas": replicas}
    if plan.max_replicas is not None:
        batch = plan.settings.engine["max_batch_tokens"] or batch_tokens_for("cuda" if plan.gpus else "cpu")
        number = {"autoscaling_config": autoscaling(replicas, plan.max_replicas, batch, dict(plan.scaling))}
    deployment: Any = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        user_config={"fingerprint": fingerprint},
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=5 * HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=plan.drain_seconds,
        max_surge_percent=SURGE_PERCENT if _room_for_one(plan) else 0,
        logging_config=_quiet(),
        **number,
    )(plan.replica_class)
    deployment = deployment.options(version=plan.version, _internal=True)
    with said():
        serve.run_many(
            [serve.RunTarget(deployment.bind(plan.settings, *plan.replica_args), name=plan.name, route_prefix=None)],
            wait_for_applications_running=False,
        )


def _room_for_one(plan: FleetPlan) -> bool:
    """Whether some node has free what a replica takes."""
    free_now = available_resources_per_node().values()
    return any(node.get("CPU", 0) >= plan.cpus and node.get("GPU", 0) >= plan.gpus for node in free_now)


def _wait_running(plan: FleetPlan, replicas: int, all_of_it: bool = True) -> None:
    """Return when that many replicas run, or one does and the others take long.

    Args:
        all_of_it: Serve must have done what it was last told, too.

    Raises:
        ClusterError: Serve gave up, or none runs in time.
    """
    began = time.monotonic()
    told = False
    while True:
        status = fleet_status(plan.name)
        waited = time.monotonic() - began
        running = status.running if status is not None else 0
        if status is not None:
            # unhealthy is a fleet that lost a replica, until another has taken its place
            settled = status.status in (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY)
            if (running >= replicas and (settled or not all_of_it)) or (running and waited > ENOUGH_SECONDS):
                return
            if status.status == ApplicationStatus.DEPLOY_FAILED and not running:
                raise ClusterError(f"the fleet of {plan.settings.name!r} does not come up: {status.why}")
        if not told and running < replicas and waited > TELL_SECONDS and not _room_for_one(plan):
            told = True
            each = f"{plan.cpus:g} CPUs" + (" and a GPU" if plan.gpus else "")
            logger.warning("%d of %d engines run yet: each asks for %s, %s", running, replicas, each, free_resources())
        if waited > FIRST_SECONDS:
            why = status.why if status is not None else "Serve knows nothing of it"
            raise ClusterError(f"no replica of {plan.settings.name!r} came up in {FIRST_SECONDS:.0f} s: {why}")
        time.sleep(POLL_SECONDS)


def _replica_info(plan: FleetPlan) -> ReplicaInfo:
    with said():
        info: ReplicaInfo = serve.get_app_handle(plan.name).info.remote().result(timeout_s=60)
    return info


def _quiet() -> LoggingConfig:
    """Serve's own logs: what goes wrong. Calls are counted by our metrics."""
    return LoggingConfig(log_level="WARNING", enable_access_log=False)
