"""Why the engine did not answer.

EngineError
├── QueueFull          more is waiting than the engine may hold; `retry_after` seconds    429
├── RequestTooLarge    the request alone is more than the whole queue may hold            413
├── Draining           shutting down: accepted requests are answered, no new ones         503
├── DeadlineExceeded   not answered in the time that the request allowed                  504
├── ReplicaLost        two replicas of a fleet were lost with the request, one after the other        503
└── EngineFailed       the forward pass raised; the message is for the log                500
"""


class EngineError(Exception):
    """Base of the engine's errors."""


class QueueFull(EngineError):
    """More texts are waiting than the engine may hold."""

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(f"the queue is full: try again in {retry_after:.0f} s")


class RequestTooLarge(EngineError):
    """One request holds more tokens, or texts, than the whole queue may."""

    def __init__(self, what: str, number: int, limit: int, holder: str = "the queue") -> None:
        super().__init__(f"the request has {number} {what}, {holder} holds {limit}: send fewer texts at a time")


class Draining(EngineError):
    """The engine is shutting down."""

    def __init__(self) -> None:
        super().__init__("the service is shutting down: send the request to another replica, or later")


class DeadlineExceeded(EngineError):
    """The answer was not ready in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"not answered within {seconds:g} s")


class EngineFailed(EngineError):
    """The forward pass raised."""


class ReplicaLost(EngineError):
    """No replica of a fleet could answer: it was lost with the request, and so was another, or there is none."""
