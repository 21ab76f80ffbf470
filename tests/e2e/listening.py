"""A client of `/v1/events` that reads in a thread, as a browser window does."""

import http.client
import json
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from tests.range_store.waiting import until


@dataclass(frozen=True)
class Event:
    kind: str
    id: str | None
    data: Any


class Listener:
    """Opens a stream and collects its events and comments.

    `ended` is None while the stream is open, then "complete" or "broken".
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        address = httpx.URL(url)
        self.connection = http.client.HTTPConnection(address.host, address.port, timeout=60)
        self.connection.request("GET", "/v1/events", headers=dict(headers or {}))
        assert isinstance(self.connection.sock, socket.socket)
        self.socket = self.connection.sock
        self.reply = self.connection.getresponse()
        self.events: list[Event] = []
        self.comments: list[str] = []
        self.ended: str | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        fields: dict[str, str] = {}
        try:
            while line := self.reply.readline():
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "" and value:
                    self.comments.append(value)
                elif name:
                    assert name not in fields, "the data of an event must be one line"
                    fields[name] = value
                elif "event" in fields:
                    self.events.append(Event(fields["event"], fields.get("id"), json.loads(fields["data"])))
                    fields = {}
                else:
                    fields = {}
            self.ended = "complete"
        except (OSError, http.client.HTTPException):
            self.ended = "broken"

    def of(self, kind: str) -> list[Event]:
        """The events of one kind so far."""
        return [each for each in self.events if each.kind == kind]

    def last(self) -> Any:
        """The data of the last `live` event; waits for the first."""
        until(lambda: self.of("live"))
        return self.of("live")[-1].data

    def erased(self) -> list[str]:
        """The concepts that the last `live` event names."""
        return [each["concept"] for each in self.last()["erasures"]]

    def close(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.connection.close()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
