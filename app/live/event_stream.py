"""Server-sent events over ASGI.

A stream has no queue: it sends the current state whenever that differs from what it last sent, so a slow reader skips
states and never lags behind. `sse-starlette` does not replace this module, because it cannot break the connection of a
reader that stopped reading (it waits for the transport to flush), and it patches `uvicorn.Server` when imported.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.http.problems import ApiError
from app.http.protocol import ABORT
from app.live.feed import ChangeFeed

MEDIA_TYPE = "text/event-stream"
TICK = 1.0
"""Seconds between two checks of whether a stream may go on; also the longest time between two looks at the state."""
PAUSE = 0.1
"""Shortest time in seconds between two looks at the state: faster changes are merged."""
HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent, so that no proxy takes the connection for dead."""
PATIENCE = 30.0
"""Seconds that a reader may leave one message unread."""
RECONNECT = b"retry: 1000\n\n"
"""Milliseconds after which a browser reconnects."""


def event(kind: str, data: bytes, id_: str | None = None) -> bytes:
    """Encode one event; `data` must be one line."""
    id_line = b"" if id_ is None else b"id: %s\n" % id_.encode()
    return b"event: %s\n%sdata: %s\n\n" % (kind.encode(), id_line, data)


class EventStream(Response):
    """A reply that ends when the client disconnects, stops reading, or `may_go_on` returns False.

    It ends like any complete reply, except that the connection of a client which stopped reading is aborted: that
    client would never see the end, and hold up a server that shuts down.

    Args:
        messages: yields the bytes to send; gets an event that is set when the feed changes.
        may_go_on: called every `TICK` seconds.
        key: id of the caller's API key.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        feed: ChangeFeed,
        messages: Callable[[asyncio.Event], AsyncIterator[bytes]],
        may_go_on: Callable[[], bool],
        key: str | None = None,
        status_code: int = 200,  # FastAPI reads it from the signature
    ) -> None:
        super().__init__(status_code=status_code, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed, self._messages, self._may_go_on, self._key = feed, messages, may_go_on, key
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.open_stream(self._key) as woken:
            if woken is not None:
                await self._stream(woken, scope, receive, send)
                return
            detail = (
                f"too many event streams: at most {self._feed.max_streams} for this model and half of that for one "
                "key; close one, or try again"
            )
            raise ApiError("too_many_streams", detail, {"Retry-After": "5"})

    async def _stream(self, woken: asyncio.Event, scope: Scope, receive: Receive, send: Send) -> None:
        gone = False

        async def end_when_refused_or_stalled() -> None:
            while self._may_go_on() and not self._stalled():
                await asyncio.sleep(TICK)
            group.cancel_scope.cancel()

        async def end_when_disconnected() -> None:
            nonlocal gone
            await disconnected(receive)
            gone = True
            group.cancel_scope.cancel()

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(end_when_refused_or_stalled)
                group.start_soon(end_when_disconnected)
                async for message in self._messages(woken):
                    await self._send(send, {"type": "http.response.body", "body": message, "more_body": True})
        except ExceptionGroup as errors:  # the log names the error itself
            raise errors.exceptions[0] from None
        if gone:
            return
        if self._sending_since is None:
            await send({"type": "http.response.body", "body": b""})
        elif (abort := scope.get("extensions", {}).get(ABORT)) is not None:
            abort()
            await disconnected(receive)

    async def _send(self, send: Send, message: Message) -> None:
        self._sending_since = time.monotonic()
        await send(message)
        self._sending_since = None  # stays set if the send was cancelled: the message has not gone out

    def _stalled(self) -> bool:
        return self._sending_since is not None and time.monotonic() - self._sending_since > PATIENCE


async def disconnected(receive: Receive) -> None:
    """Return when the client disconnects or sends a body that is refused."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except HTTPException:
        return
