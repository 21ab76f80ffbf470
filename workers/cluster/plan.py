"""What a fleet consists of: the settings and resources of its replicas, and how Ray Serve scales it. No torch."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version as package_version
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from workers.cluster.errors import ClusterError
from workers.cluster.replica import EngineReplica, ReplicaSettings
from workers.cluster.serve_status import DEPLOYMENT, PREFIX
from workers.engine.settings import batch_tokens_for

MAX_ONGOING = 1024
"""Calls that a replica takes at once: a guard against pile-ups only. The engine bounds its queue by tokens, and refuses
with a retry time; calls beyond a lower limit here would wait in the ingress, where no metric counts them."""
MAX_QUEUED = 4096
"""Calls of one ingress that may wait until Serve finds a replica, for example while all replicas are replaced."""
HEALTH_SECONDS = 2.0
"""Period of Serve's health checks."""
SURGE_PERCENT = 20
"""Share of the replicas, and at least one, that a redeployment starts before it stops as many old ones."""
TARGET_BATCHES = 4
"""Batches' worth of tokens that may wait at a replica before there are more replicas: about a second on a CPU."""
TARGET_BUSY_SHARE = 0.8
"""Share of the time that models may run before there are more replicas."""
AUTOSCALING_DEFAULTS = {
    "upscale_delay_s": 5.0,
    "downscale_delay_s": 120.0,
    "look_back_period_s": 5.0,
    "metrics_interval_s": 1.0,
}
"""Settings of Serve's `AutoscalingConfig`."""
SERVE_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve logs problems only. Requests are counted by our metrics."""


@dataclass(frozen=True)
class FleetPlan:
    """The desired state of a fleet.

    Attributes:
        replicas: number of replicas; None: one in a new fleet, and no change to a running one.
        max_replicas: if set, Serve chooses a number up to this by `QueuedTokensPolicy`.
        cpus, gpus: resources of each replica.
        drain_seconds: time that a replica has to finish its requests before it is stopped.
        scaling: changes to `AUTOSCALING_DEFAULTS`, and `target_tokens`.
        replica_class, replica_args: the actor's class and its arguments after `settings`. Ingresses of one fleet may
            pass different arguments.
        with_threads: makes this plan with another number of threads. Set if the number is a default, so that a running
            fleet keeps its own.
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
        """Name of the Serve application."""
        return PREFIX + self.settings.name

    @property
    def title(self) -> str:
        """Name of the fleet in messages."""
        return f"the fleet of {self.settings.name!r}"

    @property
    def version(self) -> str:
        """Hash of what a replica is made of. Serve replaces the replicas of another version."""
        kind = f"{self.replica_class.__module__}.{self.replica_class.__qualname__} {package_version('neuronlens')}"
        content = json.dumps([kind, asdict(self.settings)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def application(self, replicas: int, fingerprint: str | None, surge: bool) -> Any:
        """The Serve application.

        Args:
            replicas: their number, or where Serve chooses it, their number at first.
            fingerprint: of the model that replicas must have to join; None: none joins yet.
            surge: whether a redeployment starts new replicas before it stops old ones.
        """
        scale: dict[str, Any] = {"num_replicas": replicas}
        if self.max_replicas is not None:
            scale = {"autoscaling_config": self._autoscaling(replicas, self.max_replicas)}
        deployment: Any = serve.deployment(
            name=DEPLOYMENT,
            max_ongoing_requests=MAX_ONGOING,
            max_queued_requests=MAX_QUEUED,
            user_config={"fingerprint": fingerprint},
            ray_actor_options={"num_cpus": self.cpus, "num_gpus": self.gpus},
            health_check_period_s=HEALTH_SECONDS,
            health_check_timeout_s=5 * HEALTH_SECONDS,
            graceful_shutdown_wait_loop_s=0.2,
            graceful_shutdown_timeout_s=self.drain_seconds,
            max_surge_percent=SURGE_PERCENT if surge else 0,
            logging_config=SERVE_LOGGING,
            **scale,
        )(self.replica_class)
        # `_internal` silences a deprecation: Serve's own versions are random, so every ingress would restart the fleet
        deployment = deployment.options(version=self.version, _internal=True)
        return deployment.bind(self.settings, *self.replica_args)

    def _autoscaling(self, replicas: int, most: int) -> AutoscalingConfig:
        batch_tokens = self.settings.engine["max_batch_tokens"] or batch_tokens_for("cuda" if self.gpus else "cpu")
        options = {"target_tokens": float(TARGET_BATCHES * batch_tokens), **AUTOSCALING_DEFAULTS, **self.scaling}
        policy = AutoscalingPolicy(
            policy_function="workers.cluster.plan:QueuedTokensPolicy",
            policy_kwargs={"target_tokens": options.pop("target_tokens")},
        )
        return AutoscalingConfig(
            min_replicas=1, initial_replicas=min(replicas, most), max_replicas=most, policy=policy, **options
        )


class QueuedTokensPolicy:
    """Serve's autoscaling policy of a fleet, run by Serve's controller. Serve bounds and delays its decisions.

    Serve's own policy counts calls, and one call may hold a text or a thousand. Here there are as many replicas as keep
    the tokens that wait at each below `target_tokens`, and enough for what the models do now: else a fleet whose queues
    are short because it is large enough would shrink until they grow.
    """

    def __init__(self, target_tokens: float) -> None:
        self._target_tokens = target_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and state for the next call, which is unused."""
        metrics = context.aggregated_metrics or {}
        if not metrics.get("queued_tokens"):
            return context.target_num_replicas, {}
        tokens, busy = (sum(metrics[name].values()) for name in ("queued_tokens", "busy_share"))
        return max(1, math.ceil(tokens / self._target_tokens), math.ceil(busy / TARGET_BUSY_SHARE)), {}


@dataclass(frozen=True)
class Capacity:
    """The resources of one replica, and for how many of them the cluster has nodes."""

    threads: int
    gpus: float
    replicas: int


def capacity(device: str, threads: int | None, replicas: int | None) -> Capacity:
    """Size replicas for the connected cluster: a GPU each where there are any, else CPUs.

    Args:
        device: "auto" takes GPUs if the cluster has any.
        threads: CPU threads of each; None: an equal share of the CPUs, or 1 if `replicas` is None.

    Raises:
        ClusterError: `device` is a GPU, and the cluster has none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if device.startswith("cuda") and not gpus:
        raise ClusterError("no node of the cluster has a GPU: use --device cpu")
    use_gpus = gpus > 0 and device in ("auto", "cuda")
    share = min(max(cpus, default=1), max(1, sum(cpus) // replicas)) if replicas else 1
    each = threads or share
    fit = gpus if use_gpus else sum(node // each for node in cpus)
    return Capacity(each, float(use_gpus), max(1, fit))
