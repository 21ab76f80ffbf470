"""Bodies are bounded in size, time and memory, and packed and unpacked as their headers say."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.bodies import PIECE, SMALL, BodyLimits, Compression, accepts_gzip
from app.http.problems import ApiError
from tests.app.asgi import echo, send_request


def limits(max_bytes: int = 10**7, max_seconds: float = 60, max_held_bytes: int = 10**9) -> BodyLimits:
    return BodyLimits(CollectorRegistry(), max_bytes=max_bytes, max_seconds=max_seconds, max_held_bytes=max_held_bytes)


def bounded(app: ASGIApp, by: BodyLimits) -> ASGIApp:
    """The application with the bodies of its requests bounded, as routes do."""

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        with by.bounded(scope, receive) as receive_bounded:
            await app(scope, receive_bounded, send)

    return around


def refusal(app: ASGIApp, **request: object) -> ApiError:
    with pytest.raises(ApiError) as refused:
        send_request(app, **request)
    return refused.value


def test_the_limit_of_a_body_is_exact() -> None:
    app = bounded(echo, limits(100))
    for size in (0, 100):
        assert send_request(app, content=b"x" * size).status_code == 200
    assert refusal(app, content=b"x" * 101).code == "body_too_large"


def test_a_body_that_does_not_arrive_is_a_timeout() -> None:
    async def once() -> list[dict[str, object]]:
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            if not sent_body:
                sent_body.append(True)
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.sleep(60)
            raise AssertionError("the timeout did not end the wait")

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        sent_body: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {}}
        with pytest.raises(ApiError) as caught:
            await bounded(echo, limits(100, 0.05))(scope, receive, send)  # type: ignore[arg-type]
        assert caught.value.status_code == 408
        assert caught.value.headers == {"Connection": "close"}
        return sent

    assert asyncio.run(once()) == []


def test_the_timeout_of_a_body_ends_with_the_body() -> None:
    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"  # a request that is being answered waits for this

    async def once() -> None:
        async def receive() -> dict[str, object]:
            if not received:
                received.append(True)
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        received: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {}}
        await bounded(waiting, limits(100, 0.01))(scope, receive, None)  # type: ignore[arg-type]

    asyncio.run(once())


def pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


async def in_pieces(app: ASGIApp, body: bytes, size: int) -> bytes:
    """The reply to a body that arrives in pieces."""
    cut = pieces(body, size)
    sent = b""

    async def receive() -> Message:
        piece = next(cut, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: Message) -> None:
        nonlocal sent
        sent += message.get("body", b"")

    headers = [(b"content-encoding", b"gzip")]
    await app({"type": "http", "method": "POST", "path": "/", "headers": headers, "state": {}}, receive, send)
    return sent


# Packed requests

GZIPPED = {"Content-Encoding": "gzip"}
BODIES = {
    "empty": b"",
    "short": b"text",
    "a piece": b"a" * PIECE,
    "pieces": b"a" * 3 * PIECE,
    "more": bytes(range(256)) * 1000,
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_a_packed_body_is_unpacked_however_it_arrives(body: bytes, size: int) -> None:
    packed = gzip.compress(body)
    assert asyncio.run(in_pieces(bounded(echo, limits()), packed, size)) == body
    assert asyncio.run(in_pieces(bounded(echo, limits()), packed * 2, size)) == body * 2, "two members"


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "identity, gzip"])
def test_gzip_has_several_names(coding: str) -> None:
    packed = gzip.compress(b"text")
    assert (
        send_request(bounded(echo, limits(100)), content=packed, headers={"Content-Encoding": coding}).content
        == b"text"
    )


@pytest.mark.parametrize("coding", ["", "identity", " , identity"])
def test_a_plain_body_is_left_as_it_is(coding: str) -> None:
    assert (
        send_request(bounded(echo, limits(100)), content=b"text", headers={"Content-Encoding": coding}).content
        == b"text"
    )


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "gzip, br", "what"])
def test_another_encoding_is_refused_and_gzip_named(coding: str) -> None:
    refused = refusal(bounded(echo, limits(100)), content=b"text", headers={"Content-Encoding": coding})
    assert (refused.status_code, refused.code) == (415, "unsupported_media_type")
    assert "gzip" in refused.detail
    assert refused.headers == {"Accept-Encoding": "gzip"}


PACKED = gzip.compress(b"a text that is packed", mtime=0)


@pytest.mark.parametrize(
    "body",
    [b"", b"plain text", PACKED[:-1], PACKED[:12], PACKED + b"more", PACKED[:-5] + b"\0" + PACKED[-4:]],
    ids=["empty", "plain", "cut", "begun", "trailing", "damaged"],
)
@pytest.mark.parametrize("size", [1, 10**6])
def test_what_is_not_gzip_is_malformed(body: bytes, size: int) -> None:
    with pytest.raises(ApiError) as refused:
        asyncio.run(in_pieces(bounded(echo, limits(10**6)), body, size))
    assert (refused.value.status_code, refused.value.code) == (400, "malformed")
    assert "gzip" in refused.value.detail


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    seen = 0

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal seen
        while (message := await receive()).get("more_body"):
            assert len(message["body"]) <= PIECE
            seen += len(message["body"])

    with pytest.raises(ApiError) as refused:
        send_request(bounded(count, limits(200_000)), content=bomb, headers=GZIPPED)
    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")
    assert seen <= 200_000


def test_a_packed_body_without_content_is_bounded_too() -> None:
    nothing = gzip.compress(b"") * 1000
    with pytest.raises(ApiError) as refused:
        asyncio.run(in_pieces(bounded(echo, limits(1000)), nothing, 100))
    assert refused.value.code == "body_too_large"


# Memory


def test_large_bodies_share_a_bounded_memory() -> None:
    """Two large bodies fill it; a third is refused, announced or not, and a small one is not."""
    shared = limits(max_held_bytes=5 * SMALL)
    large, release = b"x" * 2 * SMALL, asyncio.Event()

    async def hold(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/held":
            await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def slowly() -> AsyncIterator[bytes]:
        for piece in pieces(large, SMALL):
            yield piece

    async def all_of_them() -> None:
        app = bounded(hold, shared)
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            held = [asyncio.create_task(client.post("/held", content=large)) for _ in range(2)]
            while shared.held < 4 * SMALL:
                await asyncio.sleep(0)
            for content in (large, slowly()):  # announced, and not
                with pytest.raises(ApiError) as refused:
                    await client.post("/", content=content)
                assert (refused.value.status_code, refused.value.code) == (503, "too_many_bodies")
            assert (await client.post("/", content=b"x" * SMALL)).status_code == 200
            assert shared.held == 4 * SMALL
            release.set()
            for each in held:
                assert (await each).status_code == 200
        assert shared.held == 0

    asyncio.run(all_of_them())


def test_a_refused_body_leaves_nothing_in_memory() -> None:
    shared = limits(2 * SMALL)
    with pytest.raises(ApiError):
        asyncio.run(in_pieces(bounded(echo, shared), gzip.compress(b"x" * 3 * SMALL), 1000))
    assert shared.held == 0


# Packed replies

LARGE = b"a line of a large reply\n" * 5000


def replying(body: bytes, **headers: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        parts = list(pieces(body, 10_000))
        for at, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": at < len(parts) - 1})

    return app


def get(app: ASGIApp, accepted: str = "gzip", method: str = "GET") -> httpx.Response:
    return send_request(Compression(app), method=method, headers={"Accept-Encoding": accepted})


def test_a_large_reply_is_packed_for_who_accepts_it() -> None:
    packed, plain = get(replying(LARGE)), get(replying(LARGE), accepted="gzip;q=0")
    assert packed.content == plain.content == LARGE
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"


def test_other_replies_are_left_as_they_are() -> None:
    for reply in (
        get(replying(b"small")),
        get(replying(LARGE), method="POST"),
        get(replying(LARGE, etag='"1"')),
        get(replying(LARGE, content_type="text/event-stream")),
        get(replying(LARGE, content_encoding="identity")),
    ):
        assert reply.headers.get("content-encoding") in (None, "identity")


@pytest.mark.parametrize(
    "accepted",
    ["gzip", "GZIP", "br, gzip", "gzip;q=0.5", "gzip ; q=1", "*", "br;q=0, *;q=0.1", "identity;q=0, gzip;Q=0.001"],
)
def test_gzip_is_accepted(accepted: str) -> None:
    assert accepts_gzip(Headers({"Accept-Encoding": accepted}))


@pytest.mark.parametrize(
    "accepted",
    ["", "br", "gzip;q=0", "gzip;q=0.000", "gzip; q=x", "*;q=0", "*, gzip;q=0", "gzipped", "identity", "gzip;q=nan"],
)
def test_gzip_is_not_accepted(accepted: str) -> None:
    assert not accepts_gzip(Headers({"Accept-Encoding": accepted}))
