"""Limits of the engine."""

from dataclasses import dataclass

CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 16_384


def batch_tokens_for(device: str) -> int:
    """Tokens of a batch on a device of this type, e.g. "cpu".

    A thousand tokens keep a few cores busy: twice as many give 3 % more texts per second, and double the time until
    the next batch. A GPU needs many thousands.
    """
    return CPU_BATCH_TOKENS if device == "cpu" else BATCH_TOKENS


@dataclass(frozen=True)
class EngineSettings:
    """Limits of the engine.

    Attributes:
        max_batch_tokens: tokens of one batch: real ones if texts are packed, else padded ones (texts × longest).
        max_batch_texts: texts of one batch.
        max_batch_plans: distinct plans of one batch; a batch that would need more is closed.
        max_queue_tokens: tokens that may wait; more is refused with `QueueFull`.
        max_queue_texts: texts that may wait.
        max_queue_seconds: time that the queue may take to drain, at the measured rate, before more is refused.
        window: batches' worth of tokens, oldest first, from which a batch of similar lengths is chosen.
        plan_cache_bytes: size of the resolved plans kept, and of the slot table on the device that holds their edits.
        trunk_cache_bytes: size of the trunk states kept, so that a text that comes again runs its tail only; 0: none.
        watched_batches: share of batches in which the bare model answers too, to count changed labels.
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
