"""uvicorn's HTTP protocol, with bounds on heads, time and connections, and with problems as its error replies.

It is our own because uvicorn bounds neither the size nor the time of a head, nor the time of a reply's reader, nor the
number of connections without refusing the new ones; and replies to invalid requests in plain text.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import httptools
from prometheus_client import CollectorRegistry, Counter, Gauge
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.http.problems import ProblemResponse
from app.observability.requests import new_request_id

if TYPE_CHECKING:
    from app.settings import Settings

ABORT = "neuronlens.abort"
"""Extension of the ASGI scope: closes the connection without waiting until the client has read what was written."""
LINGER = 2.0
"""Seconds in which a client that is still sending may read the last reply before its connection is aborted."""
LAST_CALL = 0.05
"""Seconds in which an idle connection is still read when the server stops: a request may have arrived already."""
ABORT = "neuronlens.abort"
"""Extension of the ASGI scope: breaks the connection without waiting for the client to read what was written."""
CUT = ("displaced", "refused", "late_head", "unread_body", "stalled_reader")
"""Reasons to end connections that are not merely idle: labels of `neuronlens_connections_cut_total`."""
_PER_HEADER = 4
"""Bytes of a header beside name and value: colon, space and line end."""


class Connections:
    """The connections of one server, and their bounds.

    Attributes:
        waiting: connections that may be closed for new ones: they have no request to answer, or their client does not
            read. Ordered by how long they have waited, the longest first.
        draining: the server is stopping: each connection ends with its next reply.
    """

    def __init__(self, bounds: "Settings", registry: CollectorRegistry) -> None:
        self.bounds = bounds
        self.open: set[HttpConnection] = set()
        self.waiting: dict[HttpConnection, None] = {}
        self.draining = False
        gauge = Gauge("neuronlens_connections", "HTTP connections that are open.", registry=registry)
        gauge.set_function(lambda: float(len(self.open)))
        self.cut = Counter(
            "neuronlens_connections_cut",
            "HTTP connections that the server ended: displaced by new ones or refused when there were too many, or "
            "because their head, body or reader was too slow.",
            ["reason"],
            registry=registry,
        )
        for reason in CUT:
            self.cut.labels(reason)


class HttpConnection(HttpToolsProtocol):
    """One connection. Every wait is bounded.

    A connection without a request ends after `keep_alive` seconds. A head is refused after `header_timeout` seconds
    (408) or `max_header_bytes` bytes (431). The rest of a body whose request is already answered ends the connection
    after `body_timeout`, and a reply that is not read after `write_timeout`. Beyond `max_connections`, a new connection
    displaces the one that has waited longest for a request or, above `write_timeout`, for its reader; if none waits,
    the new one is refused (503).

    An offer to upgrade to another protocol is ignored, as HTTP allows: the request is answered as HTTP/1.1.
    """

    shared: Connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._in_body = False
        """Whether the head of a request is complete and its body is not."""
        self._head_bytes = 0
        self._fed_bytes = 0
        """Bytes given to the parser since it last completed a head or a piece of a body."""
        self._completed = False
        self._refused = False
        self._refusal: bytes | None = None
        """Written after the replies to earlier requests of the connection."""
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket = transport
        super().connection_made(cast(asyncio.Transport, _OrderlyTransport(transport, self.close)))
        shared = self.shared
        shared.open.add(self)
        if len(shared.open) > shared.bounds.max_connections and not self._displace_another():
            shared.cut.labels("refused").inc()
            self._socket.write(_reply("too_many_connections", "too many connections are open: try again"))
            self._socket.close()
            return
        shared.waiting[self] = None
        self._watch(shared.bounds.header_timeout, self._refuse_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        if self._write_timer is not None:
            self._write_timer.cancel()
        self.shared.open.discard(self)
        self.shared.waiting.pop(self, None)
        super().connection_lost(exc)

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._completed = False
        fed = self._fed_bytes + len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse("malformed", "this is not a valid HTTP request")
        self._fed_bytes = 0 if self._completed else fed
        if self._fed_bytes > self.shared.bounds.max_header_bytes:
            self._refuse_large()

    def _feed(self, data: bytes) -> None:
        """Parse data; parse a request that offers an upgrade again, without the offer.

        The parser treats an upgrade as accepted: it reads no body, and leaves what follows to the other protocol.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._refused:
                    return
                method, version = self.parser.get_method(), self.parser.get_http_version().encode()
                head = [b"%s %s HTTP/%s\r\n" % (method, self.url, version)]
                head += [b"%s: %s\r\n" % each for each in self.headers if each[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                data = b"%s\r\n%s" % (b"".join(head), data[upgrade.args[0] :])

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._watch(self.shared.bounds.header_timeout, self._refuse_late)
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self._socket.abort}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + _PER_HEADER
        if self._in_head:
            super().on_header(name, value)
        elif self._head_bytes > self.shared.bounds.max_header_bytes:  # fields behind a chunked body, which are dropped
            self._refuse_large()

    def on_headers_complete(self) -> None:
        self._completed = True
        if self._head_bytes > self.shared.bounds.max_header_bytes:
            self._refuse_large()
        elif (problem := self._problem_of_head()) is not None:
            self._refuse("malformed", problem)
        if self._refused or self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self._unwatch()
        self.shared.waiting.pop(self, None)
        if self.shared.draining:
            self.cycle.keep_alive = False

    def _problem_of_head(self) -> str | None:
        """The problem of a head that the parser accepts; None: it is valid."""
        if self.parser.get_method() == b"CONNECT":
            return "CONNECT: this server is not a proxy"
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            return f"Host: the request has {hosts} of these headers, expected one"
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            return "Transfer-Encoding: only chunked is supported"
        return None

    def on_body(self, body: bytes) -> None:
        self._completed = True
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._completed = True
        if self._refused or not self._in_body:
            return
        self._in_body = False
        super().on_message_complete()
        if self.cycle.response_complete:
            self._await_request()

    # Replying

    def on_response_complete(self) -> None:
        another = bool(self.pipeline)
        super().on_response_complete()
        self._unset_keepalive_if_required()  # any byte would end that timer
        if another or self.transport.is_closing():
            return
        if self._refusal is not None:
            self._socket.write(self._refusal)
            self.close()
        else:
            self._await_request()

    def _await_request(self) -> None:
        """Wait for the rest of the last body or for the next request, after every request is answered."""
        self.shared.waiting[self] = None
        bounds = self.shared.bounds
        if self._in_body:
            self._watch(bounds.body_timeout, self._end_unread)
        elif not self._in_head:
            self._watch(bounds.keep_alive, self.close)

    def _end_unread(self) -> None:
        self.shared.cut.labels("unread_body").inc()
        self.close()

    def _refuse_large(self) -> None:
        most = self.shared.bounds.max_header_bytes
        detail = f"the head of the request is larger than {most} bytes: send fewer or shorter headers"
        self._refuse("head_too_large", detail)

    def _refuse_late(self) -> None:
        if self._answering():
            self._watch(self.shared.bounds.header_timeout, self._refuse_late)  # the request before it is answered first
            return
        self.shared.cut.labels("late_head").inc()
        detail = f"the head of the request took longer than {self.shared.bounds.header_timeout:g} s"
        self._refuse("request_timeout", detail)

    def _refuse(self, code: str, detail: str) -> None:
        """Reply with a problem after the replies to earlier requests, then close the connection."""
        if self._refused:
            return
        self._refused = True
        self._unwatch()
        reply = _reply(code, detail)
        answering = self._answering()
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # the refused request itself, which nobody has begun to answer
        elif self._in_body:
            if answering:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                if not self.cycle.response_started:
                    self._socket.write(reply)
            self.close()
            return
        if answering:
            self._refusal = reply
        else:
            self._socket.write(reply)
            self.close()

    # Closing

    def close(self) -> None:
        """Close the connection once the client has read what was written.

        If the client is still sending, the end of the stream is sent first: closing with unread data would reset the
        connection, and the reply would be lost.
        """
        transport = cast(_OrderlyTransport, self.transport)
        if transport.is_closing():
            return
        transport.closing = True
        self.shared.waiting[self] = None
        self._unwatch()
        if (self._in_head or self._in_body or self._refused) and self._socket.can_write_eof():
            self._socket.write_eof()
            self.flow.resume_reading()
            self._watch(LINGER, self._end_lingering)
        else:
            self._socket.close()
        self._watch_writing()

    def shutdown(self) -> None:
        if self._answering():
            self.answer_last()
        elif not self._in_head and not self.transport.is_closing():
            self._watch(LAST_CALL, self.close)

    def answer_last(self) -> None:
        """Close the connection after the reply to the current request, if there is one."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_lingering(self) -> None:
        if self._socket.get_write_buffer_size():
            self._watch(LINGER, self._end_lingering)
        else:
            self._socket.abort()

    def _displace_another(self) -> bool:
        waiting = next(iter(self.shared.waiting), None)
        if waiting is None:
            return False
        self.shared.cut.labels("displaced").inc()
        self.shared.open.discard(waiting)
        self.shared.waiting.pop(waiting)
        waiting._socket.abort()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering():
            self.shared.waiting.pop(self, None)
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_writing(self) -> None:
        """Abort the connection if the client reads nothing for `write_timeout` seconds."""
        self._unwritten = self._socket.get_write_buffer_size()
        if self._unwritten and self._write_timer is None:
            self._write_timer = self.loop.call_later(self.shared.bounds.write_timeout, self._end_stalled)

    def _end_stalled(self) -> None:
        self._write_timer = None
        if self._socket.get_write_buffer_size() >= self._unwritten:
            self.shared.cut.labels("stalled_reader").inc()
            self._socket.abort()
        else:
            self.shared.waiting.setdefault(self, None)
            self._watch_writing()

    def _watch(self, seconds: float, late: Callable[[], None]) -> None:
        self._unwatch()
        self._timer = self.loop.call_later(seconds, late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _OrderlyTransport:
    """A transport whose `close`, which uvicorn calls, is the one of the connection."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self.close = close
        self.closing = False

    def write(self, data: bytes) -> None:
        if not self.closing:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self.closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _reply(code: str, detail: str) -> bytes:
    request_id = new_request_id()
    headers = {"connection": "close", "x-request-id": request_id}
    response = ProblemResponse(code, detail, headers, request_id=request_id)
    head = b"".join(b"%s: %s\r\n" % each for each in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%s\r\n%s" % (response.status_code, head, bytes(response.body))


def http_protocol(bounds: "Settings", registry: CollectorRegistry) -> type[HttpConnection]:
    """The protocol class of one server with these bounds, for uvicorn's configuration."""
    return type("HttpConnection", (HttpConnection,), {"shared": Connections(bounds, registry)})
