"""Limits of the engine."""

from dataclasses import dataclass

CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 16_384


def batch_tokens_for(device: str) -> int:
    """Tokens of a batch on a device of this type, e.g. "cpu".

    A few cores are busy with a thousand tokens: twice as many win three in a hundred texts per second and double the
    time until the next batch. A GPU is not busy before many thousands.
    """
    return CPU_BATCH_TOKENS if device == "cpu" else BATCH_TOKENS


@dataclass(frozen=True)
class EngineSettings:
    """How much the engine takes at once.

    Attributes:
        max_batch_tokens: tokens of one batch: real ones where texts are packed, else padded ones (texts × longest).
        max_batch_texts: texts of one batch.
        max_batch_plans: distinct plans of one batch; a batch that would need more is closed.
        max_queue_tokens: tokens that may wait; more is refused with `QueueFull`.
        max_queue_texts: texts that may wait, in the same way.
        max_queue_seconds: how long what waits may take, at the rate that was measured, before more is refused.
        window: batches' worth of tokens that are looked at, oldest first, when a batch is sorted by length.
        plan_cache_bytes: resolved plans kept on the device, least recently used dropped.
        trunk_cache_bytes: trunk states kept, so that a text that comes again costs its tail only; 0 keeps none.
        watched_batches: share of batches in which erased texts are also answered bare, to count changed labels.
    """

    max_batch_tokens: int = CPU_BATCH_TOKENS
    max_batch_texts: int = 512
    max_batch_plans: int = 64
    max_queue_tokens: int = 262_144
    max_queue_texts: int = 16_384
    max_queue_seconds: float = 10.0
    window: int = 4
    plan_cache_bytes: int = 256 << 20
    trunk_cache_bytes: int = 0
    watched_batches: float = 0.01
