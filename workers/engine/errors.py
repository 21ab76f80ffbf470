"""Why the engine did not answer.

EngineError
├── QueueFull          the queue is full; `retry_after` seconds                                     429
├── RequestTooLarge    the request alone is larger than the whole queue                             413
├── Draining           shutting down: accepted requests are answered, no new ones                   503
├── DeadlineExceeded   not answered within the time that the request allowed                        504
├── ReplicaLost        two replicas of a fleet were lost with the request, one after the other      503
└── EngineFailed       the forward pass raised; the message is for the log                          500
"""

from typing import ClassVar


class EngineError(Exception):
    """Base of the engine's errors."""

    reason: ClassVar[str] = "failed"
    """The value of the label `reason` in metrics."""


class QueueFull(EngineError):
    """The queue holds as many texts or tokens as it may."""

    reason = "queue_full"

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full: try again in {retry_after:.0f} s")


class RequestTooLarge(EngineError):
    """One request has more tokens, or texts, than the whole queue may hold."""

    reason = "too_large"

    def __init__(self, what: str, number: int, limit: int, holder: str = "the queue") -> None:
        super().__init__(f"the request has {number} {what}, {holder} holds {limit}: send fewer texts at a time")


class Draining(EngineError):
    """The engine is shutting down."""

    reason = "draining"

    def __init__(self) -> None:
        super().__init__("the service is shutting down: send the request to another replica, or later")


class DeadlineExceeded(EngineError):
    """The answer was not ready in time."""

    reason = "deadline"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not answered within {seconds:g} s")


class EngineFailed(EngineError):
    """The forward pass raised."""


class ReplicaLost(EngineError):
    """No replica of a fleet could answer: two were lost with the request, or there is none."""

    reason = "lost"
