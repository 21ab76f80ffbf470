"""Bodies: of requests bounded in size, time and memory and unpacked from gzip, of replies packed with it."""

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipResponder, IdentityResponder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problems import ApiError

SMALL = 65536
"""Bytes of a body that is accepted however full the memory for bodies is: large ones never shut out small ones."""
PIECE = 65536
"""Bytes that are unpacked at once."""


class BodyLimits:
    """Bounds on the bodies of requests, packed or not: their size, their time, and the memory that they hold together.

    FastAPI's `max_body_size` bounds the size alone, and replies in plain text.

    Args:
        max_bytes: of one body, unpacked.
        max_seconds: that one body may take to arrive.
        max_held_bytes: of the bodies of all requests that are not answered yet; those up to `SMALL` are not counted.
    """

    def __init__(self, registry: CollectorRegistry, *, max_bytes: int, max_seconds: float, max_held_bytes: int) -> None:
        self.max_bytes, self.max_seconds, self.max_held_bytes = max_bytes, max_seconds, max_held_bytes
        self.held = 0
        gauge = Gauge(
            "neuronlens_body_bytes",
            f"Bytes that bodies above {SMALL} bytes of unanswered requests hold together.",
            registry=registry,
        )
        gauge.set_function(lambda: float(self.held))
        limit = Gauge("neuronlens_body_bytes_limit", "Bytes that these bodies may hold.", registry=registry)
        limit.set(max_held_bytes)

    @contextmanager
    def bounded(self, scope: Scope, receive: Receive) -> Iterator[Receive]:
        """A `receive` for a request that gives its body within the bounds; leave it when the request is answered.

        Raises:
            ApiError: at once if the announced size is out of bounds (413, 503) or the coding is not gzip (415); from
                the returned `receive` if the body turns out to be, is late (408) or is not valid gzip (400).
        """
        announced = Headers(scope=scope).get("content-length", "0")
        self._check(int(announced) if announced.isdecimal() else 0)
        receive = self._unpacked(scope, receive)
        received, held, more = 0, 0, True
        deadline = asyncio.get_running_loop().time() + self.max_seconds

        async def receive_bounded() -> Message:
            nonlocal received, held, more
            if not more:  # what comes after the body, a disconnect, may take its time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body took longer than {self.max_seconds:g} s to arrive"
                raise ApiError("request_timeout", late, {"Connection": "close"}) from None
            more = message.get("more_body", False)
            received += len(message.get("body", b""))
            self.held -= held
            held = 0
            self._check(received)
            if received > SMALL:
                held = received
                self.held += held
            return message

        try:
            yield receive_bounded
        finally:
            self.held -= held

    def _check(self, size: int) -> None:
        if size > self.max_bytes:
            raise ApiError(
                "body_too_large", f"the body is larger than {self.max_bytes} bytes: send fewer texts at a time"
            )
        if size > SMALL and self.held + size > self.max_held_bytes:
            detail = f"bodies of other requests hold {self.max_held_bytes} bytes: send it again later"
            raise ApiError("too_many_bodies", detail)

    def _unpacked(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, or one that unpacks the body if its `Content-Encoding` is gzip."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        named = ",".join(Headers(scope=scope).getlist("content-encoding")).lower().split(",")
        codings = [coding for each in named if (coding := each.strip()) not in ("", "identity")]
        if not codings:
            return receive
        if codings not in (["gzip"], ["x-gzip"]):
            detail = "Content-Encoding: only gzip is supported; send the body packed with gzip once, or as it is"
            raise ApiError("unsupported_media_type", detail, {"Accept-Encoding": "gzip"})
        del MutableHeaders(scope=scope)["content-encoding"]
        return _unpack(receive, self.max_bytes)


def _unpack(receive: Receive, max_packed_bytes: int) -> Receive:
    """A `receive` that gives the body of `receive` unpacked, at most `PIECE` bytes at once."""
    unpacker = zlib.decompressobj(wbits=31)
    packed, received, more, ended = b"", 0, True, False

    async def receive_unpacked() -> Message:
        nonlocal unpacker, packed, received, more, ended
        if ended:
            return await receive()
        if not packed and more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            packed, more = message.get("body", b""), message.get("more_body", False)
            received += len(packed)
            if received > max_packed_bytes:  # a packed body may be longer than what is in it
                raise ApiError("body_too_large", f"the body is larger than {max_packed_bytes} bytes")
        if unpacker.eof and packed:  # gzip allows several members, one after the other
            unpacker = zlib.decompressobj(wbits=31)
        try:
            piece = unpacker.decompress(packed, PIECE)
        except zlib.error:
            raise ApiError("malformed", "the body is not valid gzip, although its Content-Encoding is gzip") from None
        packed = unpacker.unconsumed_tail or unpacker.unused_data
        pending = bool(packed) or (len(piece) == PIECE and not unpacker.eof)
        if not pending and not more:
            ended = True
            if not unpacker.eof:
                raise ApiError("malformed", "the body ends in the middle of its gzip data")
        return {"type": "http.request", "body": piece, "more_body": not ended}

    return receive_unpacked


class Compression:
    """Packs large replies to GET with gzip, for clients that accept it.

    Starlette's own GZipMiddleware also packs answers to POST, which takes longer than sending them; replies with an
    ETag, which names one sequence of bytes; and replies to clients that refuse gzip by `q=0`.
    """

    def __init__(self, app: ASGIApp, minimum: int = 16384) -> None:
        self.app = app
        self.minimum = minimum

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self.app(scope, receive, send)
        elif accepts_gzip(Headers(scope=scope)):
            await _Gzip(self.app, self.minimum, compresslevel=6)(scope, receive, send)
        else:
            await IdentityResponder(self.app, self.minimum)(scope, receive, send)


class _Gzip(GZipResponder):
    tagged = False

    async def send_with_compression(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.tagged = "etag" in Headers(raw=message["headers"])
        if self.tagged:
            await self.send(message)
        else:
            await super().send_with_compression(message)


def accepts_gzip(headers: Headers) -> bool:
    """Whether a client takes gzip: `Accept-Encoding` names it, or `*`, with a weight above 0 (RFC 9110, 12.5.3)."""
    weights = {}
    for each in ",".join(headers.getlist("accept-encoding")).split(","):
        coding, _, weight = each.partition(";")
        name, _, value = weight.partition("=")
        try:
            weights[coding.strip().lower()] = float(value) if name.strip().lower() == "q" else 1.0
        except ValueError:
            weights[coding.strip().lower()] = 0.0
    return weights.get("gzip", weights.get("*", 0.0)) > 0
