"""Bodies of requests and replies: bounded in size, time and memory, and packed with gzip where that is asked for."""

import asyncio
import zlib

from prometheus_client import CollectorRegistry, Gauge
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipResponder, IdentityResponder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problems import ApiError, problem_response

SMALL = 65536
"""Bytes of a body that is let in however full the memory for bodies is: large ones never shut out small ones."""
PIECE = 65536
"""Bytes that are unpacked at once."""


class BodyMemory:
    """How much the bodies of all requests that are not answered yet may hold together; those up to `SMALL` not counted.

    Args:
        most: in bytes.
    """

    def __init__(self, most: int, registry: CollectorRegistry) -> None:
        self.most = most
        self.held = 0
        gauge = Gauge(
            "neuronlens_body_bytes",
            f"Bytes that bodies above {SMALL} bytes of unanswered requests hold together.",
            registry=registry,
        )
        gauge.set_function(lambda: float(self.held))
        limit = Gauge("neuronlens_body_bytes_limit", "Bytes that these bodies may hold.", registry=registry)
        limit.set(most)

    def room_for(self, size: int) -> bool:
        """Whether a body of this size may be held besides those that are."""
        return size <= SMALL or self.held + size <= self.most


class BodyLimit:
    """Refuses a body above `limit` bytes, announced or not, one that takes longer than `seconds`, or is one too many.

    Args:
        memory: what bodies hold until their requests are answered.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float, memory: BodyMemory) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds
        self.memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        detail = f"the body is larger than {self.limit} bytes: send fewer texts at a time"
        full = f"bodies of other requests hold {self.memory.most} bytes: send it again later"
        announced = Headers(scope=scope).get("content-length", "0")
        size = int(announced) if announced.isdecimal() else 0
        if size > self.limit or not self.memory.room_for(size):
            request_id = scope.get("state", {}).get("request_id")
            if size > self.limit:
                refusal = problem_response("body_too_large", detail, request_id)
            else:
                refusal = problem_response("too_many_bodies", full, request_id)
            await refusal(scope, receive, send)
            return
        received, held, more = 0, 0, True
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def count() -> Message:
            nonlocal received, held, more
            if not more:  # what comes after the body, a disconnect, may take its time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body took longer than {self.seconds:g} s to arrive"
                raise ApiError("request_timeout", late, {"Connection": "close"}) from None
            more = message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self.limit:
                raise ApiError("body_too_large", detail)
            if received > SMALL:
                self.memory.held -= held
                held = 0
                if not self.memory.room_for(received):
                    raise ApiError("too_many_bodies", full)
                held = received
                self.memory.held += held
            return message

        try:
            await self.app(scope, count, send)
        finally:
            self.memory.held -= held


class GzipBodies:
    """Unpacks bodies that come with `Content-Encoding: gzip`, piece by piece; refuses other encodings (415).

    Args:
        limit: of a packed body. What is unpacked is for `BodyLimit`, inside of this layer.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        codings = _codings(scope) if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH") else []
        if not codings:
            await self.app(scope, receive, send)
        elif codings in (["gzip"], ["x-gzip"]):
            headers = MutableHeaders(scope=scope)
            del headers["content-encoding"]
            await self.app(scope, _unpacked(receive, self.limit), send)
        else:
            detail = "Content-Encoding: only gzip is supported; send the body packed with gzip once, or as it is"
            request_id = scope.get("state", {}).get("request_id")
            refusal = problem_response("unsupported_media_type", detail, request_id, {"Accept-Encoding": "gzip"})
            await refusal(scope, receive, send)


def _codings(scope: Scope) -> list[str]:
    named = ",".join(Headers(scope=scope).getlist("content-encoding")).lower().split(",")
    return [coding for each in named if (coding := each.strip()) not in ("", "identity")]


def _unpacked(receive: Receive, limit: int) -> Receive:
    """Gives the messages of `receive` with the body unpacked, at most `PIECE` bytes at once."""
    unpacker = zlib.decompressobj(wbits=31)
    packed, received, more, ended = b"", 0, True, False

    async def unpack() -> Message:
        nonlocal unpacker, packed, received, more, ended
        if ended:
            return await receive()
        if not packed and more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            packed, more = message.get("body", b""), message.get("more_body", False)
            received += len(packed)
            if received > limit:  # a packed body may be longer than what is in it
                raise ApiError("body_too_large", f"the body is larger than {limit} bytes")
        if unpacker.eof and packed:  # gzip allows several members, one after the other
            unpacker = zlib.decompressobj(wbits=31)
        try:
            piece = unpacker.decompress(packed, PIECE)
        except zlib.error:
            raise ApiError("malformed", "the body is not valid gzip, as its Content-Encoding says") from None
        packed = unpacker.unconsumed_tail or unpacker.unused_data
        pending = bool(packed) or (len(piece) == PIECE and not unpacker.eof)
        if not pending and not more:
            ended = True
            if not unpacker.eof:
                raise ApiError("malformed", "the body ends in the middle of its gzip data")
        return {"type": "http.request", "body": piece, "more_body": not ended}

    return unpack


class Compression:
    """Packs large replies to GET with gzip, for clients that accept it.

    Not those with an ETag: it names one sequence of bytes. Answers to POST are left as they are, since packing them
    would take longer than sending them.
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
