"""Following what changes: server-sent events as they arrive, and when to connect again, without the network."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from neuronlens_client.calls import CONNECT, Caller, pause_before
from neuronlens_client.errors import ConnectionFailed, NeuronLensError, Overloaded, Unavailable, UnexpectedReply
from neuronlens_client.replies import Job, LiveState

SILENCE = 45.0
"""Seconds without a byte after which a stream is taken for dead; the server breaks its silence every 15 s."""


@dataclass(frozen=True)
class LiveChanged:
    """What is erased when a request names nothing, now; also the first event of all."""

    state: LiveState


@dataclass(frozen=True)
class RangeSetsChanged:
    """A range set was published, removed or activated: read the list again. Also told at every connect."""


@dataclass(frozen=True)
class JobChanged:
    """A fit began, got on, or ended; told of the last ones at connect too."""

    job: Job


@dataclass(frozen=True)
class OtherEvent:
    """What this version does not know."""

    name: str
    data: Mapping[str, Any]


Event = LiveChanged | RangeSetsChanged | JobChanged | OtherEvent


class Following:
    """One caller's stream of events over all its connections; what was told before a break is not told again.

    Args:
        patience: seconds without a connection after which the error is raised; None: the caller's timeout.
    """

    def __init__(self, caller: Caller, patience: float | None) -> None:
        self.caller = caller
        self.url = caller.url + "/v1/events"
        self.params = caller.model
        self.headers = caller.headers | {"accept": "text/event-stream"}
        self.timeout = httpx.Timeout(SILENCE, connect=CONNECT)
        self._patience = caller.timeout if patience is None else patience
        self._buffer = b""
        self._told: dict[tuple[str, Any], bytes] = {}
        self._failures = 0
        self._in_touch = time.monotonic()

    def accepts(self, response: httpx.Response) -> bool:
        """Whether a reply is the stream; raises UnexpectedReply if it is another kind of success."""
        if response.status_code >= 300:
            return False
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise UnexpectedReply("answered, but no stream of events", status=response.status_code)
        return True

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that a chunk completes."""
        self._failures, self._in_touch = 0, time.monotonic()
        # not by str.splitlines: JSON may hold U+2028, which is no line end here
        *whole, self._buffer = (self._buffer + chunk.replace(b"\r", b"")).split(b"\n\n")
        for block in whole:
            event = self._event(block)
            if event is not None:
                yield event

    def pause(self, error: httpx.RequestError | NeuronLensError | None) -> float:
        """A connection ended, or none came about: seconds until the next one.

        Raises:
            NeuronLensError: trying again would not help, or `patience` is over.
        """
        self._buffer = b""
        if isinstance(error, httpx.RequestError):
            error = ConnectionFailed(f"no events from {self.caller.shown} ({type(error).__name__})")
        seconds = pause_before(self._failures, error.retry_after if error else None)
        self._failures += 1
        if error is not None and not isinstance(error, ConnectionFailed | Overloaded | Unavailable):
            raise error
        if time.monotonic() + seconds - self._in_touch > self._patience:
            raise error or ConnectionFailed(f"{self.caller.shown} ends every stream of events at once")
        return seconds

    def _event(self, block: bytes) -> Event | None:
        """An event, unless it is a comment, or nothing new."""
        name, data = "message", b""
        for line in block.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                name = value.decode(errors="replace")
            elif field == b"data":
                data += value
        if not data:
            return None
        try:
            decoded = json.loads(data)
            about = (name, decoded.get("id"))
            if name != "range_sets" and self._told.get(about) == data:
                return None
            self._told[about] = data
            match name:
                case "live":
                    return LiveChanged(LiveState.model_validate(decoded))
                case "range_sets":
                    return RangeSetsChanged()
                case "jobs":
                    return JobChanged(Job.model_validate(decoded))
            return OtherEvent(name, decoded)
        except (ValueError, AttributeError, ValidationError):
            raise UnexpectedReply("an event is not as this client knows it: is the server another version?") from None
