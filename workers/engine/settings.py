"""Limits of the engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """How much the engine takes at once.

    Attributes:
        max_batch_tokens: padded tokens of one batch (texts × longest text).
        max_batch_texts: texts of one batch.
        max_batch_plans: distinct plans of one batch; a batch that would need more is closed.
        max_queue_tokens: tokens that may wait; more is refused with `QueueFull`.
        window: texts that are looked at, oldest first, when a batch is sorted by length.
        plan_cache: resolved plans kept, least recently used dropped.
    """

    max_batch_tokens: int = 4096
    max_batch_texts: int = 128
    max_batch_plans: int = 64
    max_queue_tokens: int = 262_144
    window: int = 512
    plan_cache: int = 256
