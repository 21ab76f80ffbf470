"""Events of the server: their types, which of them are new, and when to connect again."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, SSEError
from pydantic import ValidationError

from neuronlens_client.call import CONNECT_TIMEOUT, origin, pause_before
from neuronlens_client.errors import ConnectionFailed, NeuronLensError, Overloaded, Unavailable, UnexpectedReply
from neuronlens_client.replies import Job, LiveState

TIMEOUT = httpx.Timeout(45.0, connect=CONNECT_TIMEOUT)
"""A stream without a byte for so long is taken for dead; the server sends a comment every 15 s."""


@dataclass(frozen=True)
class LiveChanged:
    """The live erasures changed. This is also the first event, with the current state."""

    state: LiveState


@dataclass(frozen=True)
class RangeSetsChanged:
    """A range set was published, removed or activated: read the list again. It is also sent at every connection."""


@dataclass(frozen=True)
class JobChanged:
    """A fit began, advanced or ended. The latest jobs are also sent at every connection."""

    job: Job


@dataclass(frozen=True)
class OtherEvent:
    """An event that this version of the client does not know."""

    name: str
    data: Mapping[str, Any]


Event = LiveChanged | RangeSetsChanged | JobChanged | OtherEvent


class EventStream:
    """The state of one `events()` iterator over all its connections.

    Args:
        url: of the stream.
        reconnect_timeout: seconds without a connection after which the error is raised.
    """

    def __init__(self, url: str, reconnect_timeout: float) -> None:
        self._server = origin(url)
        self._reconnect_timeout = reconnect_timeout
        self._latest: dict[tuple[str, Any], str] = {}
        self._received = False
        self._failures = 0
        self._connected_at = time.monotonic()

    def receive(self, sent: ServerSentEvent) -> Event | None:
        """The event that was sent; None if it has no data, or repeats what was sent before a connection broke.

        Raises:
            UnexpectedReply: its data is not what the client expects.
        """
        self._received = True
        if not sent.data:
            return None
        try:
            data = json.loads(sent.data)
            subject = sent.event, data.get("id")
            if sent.event != "range_sets" and self._latest.get(subject) == sent.data:
                return None
            self._latest[subject] = sent.data
            match sent.event:
                case "live":
                    return LiveChanged(LiveState.model_validate(data))
                case "range_sets":
                    return RangeSetsChanged()
                case "jobs":
                    return JobChanged(Job.model_validate(data))
            return OtherEvent(sent.event, data)
        except (ValueError, AttributeError, ValidationError):
            raise UnexpectedReply(f"invalid event {sent.event!r}: does the server have another version?") from None

    def pause_after(self, error: httpx.RequestError | NeuronLensError | None) -> float:
        """Seconds to wait before connecting again, after a connection ended or failed.

        Raises:
            NeuronLensError: connecting again would not help, or the time to reconnect is over.
        """
        if self._received:
            self._received, self._failures, self._connected_at = False, 0, time.monotonic()
        if isinstance(error, SSEError):
            error = UnexpectedReply("the reply is not a stream of events")
        elif isinstance(error, httpx.RequestError):
            error = ConnectionFailed(f"no events from {self._server} ({type(error).__name__})")
        if error is not None and not isinstance(error, ConnectionFailed | Overloaded | Unavailable):
            raise error
        self._failures += 1
        pause = pause_before(self._failures, error.retry_after if error else None)
        if time.monotonic() + pause - self._connected_at > self._reconnect_timeout:
            raise error or ConnectionFailed(f"{self._server} ends every stream of events at once")
        return pause
