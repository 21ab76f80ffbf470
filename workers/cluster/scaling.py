"""How many replicas a fleet has where Ray Serve chooses: by the tokens that wait, and by how busy the models are."""

import math
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

TARGET_BATCHES = 4
"""Batches' worth of tokens that may wait at a replica: on a CPU about a second's work."""
BUSY = 0.8
"""Share of the time that models may run before there must be more of them, or may not be fewer."""
DEFAULTS = {
    "upscale_delay_s": 5.0,
    "downscale_delay_s": 120.0,
    "look_back_period_s": 5.0,
    "metrics_interval_s": 1.0,
}
"""For so long more, or fewer, must be wanted; what is averaged over; how often replicas tell."""


class ByQueuedTokens:
    """Serve's policy of a fleet, run by its controller.

    As many replicas as keep what waits at each below `target_tokens`; and no fewer than can do what the models do now,
    so that a fleet whose queues are short because it is large enough does not shrink until they grow.
    """

    def __init__(self, target_tokens: float) -> None:
        self._target = target_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many are wanted. Serve bounds and delays it."""
        told = context.aggregated_metrics or {}
        if not told.get("queued_tokens"):
            return context.target_num_replicas, {}
        return wanted(sum(told["queued_tokens"].values()), sum(told["busy_share"].values()), self._target), {}


def wanted(queued_tokens: float, busy: float, target_tokens: float) -> int:
    """Replicas for so many tokens that wait or run, and models that run for `busy` times the time, all together."""
    return max(1, math.ceil(queued_tokens / target_tokens), math.ceil(busy / BUSY))


def autoscaling(replicas: int, most: int, batch_tokens: int, changes: dict[str, float]) -> AutoscalingConfig:
    """Serve's settings for 1 to `most` replicas, at first `replicas`. `changes`: of `DEFAULTS`, and `target_tokens`."""
    chosen = {"target_tokens": float(TARGET_BATCHES * batch_tokens), **DEFAULTS, **changes}
    target = chosen.pop("target_tokens")
    policy = AutoscalingPolicy(
        policy_function="workers.cluster.scaling:ByQueuedTokens", policy_kwargs={"target_tokens": target}
    )
    return AutoscalingConfig(
        min_replicas=1, initial_replicas=min(replicas, most), max_replicas=most, policy=policy, **chosen
    )
