"""uvicorn's HTTP protocol with bounds on a request's head, and problems as its own error replies."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.events import ABORT
from app.problems import new_request_id, problem_response

_PER_HEADER = 4
"""Bytes of a header besides name and value: colon, space and line end."""


class BoundedHead(HttpToolsProtocol):
    """Refuses a head above `max_header_bytes` (431), or one that takes longer than `header_timeout` seconds (408)."""

    max_header_bytes = 32768
    header_timeout = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0  # of what the parser has told of
        self._fed_bytes = 0  # of what it was given since the head began: it keeps half a header to itself
        self._refused = False
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._fed_bytes = self._fed_bytes + len(data) if self._in_head else 0
        if self._fed_bytes > self.max_header_bytes:
            self._refuse_large()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._watch()
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + _PER_HEADER
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._unwatch()
        if self._head_bytes > self.max_header_bytes:
            self._refuse_large()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP."""
        self._refuse(400, "malformed", "this is no HTTP request")

    def _refuse_large(self) -> None:
        detail = f"the head of the request is larger than {self.max_header_bytes} bytes: send fewer or shorter headers"
        self._refuse(431, "head_too_large", detail)

    def _watch(self) -> None:
        self._unwatch()
        self._late = self.loop.call_later(self.header_timeout, self._refuse_late)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._watch()  # the request before it is still being answered
        else:
            self._refuse(408, "request_timeout", f"the head of the request took longer than {self.header_timeout:g} s")

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Write a problem, as the last thing on this connection."""
        if self._refused:
            return
        self._refused = True
        self._unwatch()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # else it would stand in the middle of another reply
            response = problem_response(status, code, detail, new_request_id(), {"connection": "close"})
            head = b"".join(b"%s: %s\r\n" % each for each in response.raw_headers)
            self.transport.write(b"HTTP/1.1 %d \r\n%s\r\n%s" % (status, head, bytes(response.body)))
        self.transport.close()


def bounded_head(max_header_bytes: int, header_timeout: float) -> type[BoundedHead]:
    """The protocol with these bounds, as uvicorn's configuration takes it."""
    bounds = {"max_header_bytes": max_header_bytes, "header_timeout": header_timeout}
    return type("BoundedHead", (BoundedHead,), bounds)
