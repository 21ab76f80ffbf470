"""Server-sent events: what changed, told to whoever holds a stream open.

A stream has no queue. It looks at what is true now, tells it if it differs from what it told last, and sleeps until it
is woken: however slowly its reader reads, it is the newest state that comes next.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.http.problems import problem_response
from app.live.feed import News

MEDIA_TYPE = "text/event-stream"
TICK = 1.0
"""Seconds after which a stream looks again whether it may go on, and what is true, woken or not."""
PAUSE = 0.1
"""Seconds between two looks: of a hundred changes a second, a reader needs the last."""
HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent, so that nobody on the way takes the connection for dead."""
PATIENCE = 30.0
"""Seconds that one message may wait for its reader."""
RECONNECT = b"retry: 1000\n\n"
"""Milliseconds after which a browser tries again."""


def event(kind: str, data: bytes, id_: str | None = None) -> bytes:
    """One event; `data` is one line."""
    named = b"" if id_ is None else b"id: %s\n" % id_.encode()
    return b"event: %s\n%sdata: %s\n\n" % (kind.encode(), named, data)


class EventStream(Response):
    """A reply that goes on until the client hangs up or reads no more, or `may_go_on` says no.

    It then ends as a whole reply does. A reader that has stopped reading would never see that end, and hold a server
    that shuts down: its connection is broken.

    Args:
        messages: given an event that is set on news, what to send; empty for nothing yet.
        may_go_on: asked every `TICK` seconds.
        key: the id of the caller's key, if there is one.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        news: News,
        messages: Callable[[asyncio.Event], AsyncIterator[bytes]],
        may_go_on: Callable[[], bool],
        key: str | None = None,
        status_code: int = 200,  # FastAPI looks for it here
    ) -> None:
        super().__init__(status_code=status_code, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._news, self._messages, self._may_go_on = news, messages, may_go_on
        self._key = key
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._news.following(self._key) as woken:
            if woken is None:
                request_id = scope.get("state", {}).get("request_id")
                detail = (
                    f"of {self._news.most} streams for this model, or of the half for one key, none is left: "
                    "close one, or try again"
                )
                refusal = problem_response(429, "too_many_streams", detail, request_id, {"Retry-After": "5"})
                await refusal(scope, receive, send)
                return
            await self._stream(woken, scope, receive, send)

    async def _stream(self, woken: asyncio.Event, scope: Scope, receive: Receive, send: Send) -> None:
        gone = False

        async def watch() -> None:
            while self._may_go_on() and not self._stuck():
                await asyncio.sleep(TICK)
            group.cancel_scope.cancel()

        async def hear() -> None:
            nonlocal gone
            await disconnected(receive)
            gone = True
            group.cancel_scope.cancel()

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(watch)
                group.start_soon(hear)
                async for message in self._messages(woken):
                    await self._send(send, {"type": "http.response.body", "body": message, "more_body": True})
        except ExceptionGroup as errors:  # one of three tasks failed; the log is to name its error
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
        self._sending_since = None  # not where it was cancelled: then it has not gone out

    def _stuck(self) -> bool:
        return self._sending_since is not None and time.monotonic() - self._sending_since > PATIENCE


ABORT = "neuronlens.abort"
"""Extension of the ASGI scope: breaks the connection without waiting for what was written to be read."""


async def disconnected(receive: Receive) -> None:
    """Returns when the client hangs up, or sends what it should not."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except HTTPException:
        return  # a body, too large or too slow
