"""The head of a request is bounded in size and time, over a real connection."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from app.protocol import bounded_head
from tests.range_store.waiting import until

LIMIT, SECONDS = 2048, 600.0
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n%s\r\nbody"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    """A server that bounds the head of a request; no head is late by itself."""
    protocol = bounded_head(LIMIT, SECONDS)
    config = uvicorn.Config(echo, host="127.0.0.1", port=0, http=protocol, lifespan="off", log_level="critical")
    made = uvicorn.Server(config)
    thread = threading.Thread(target=made.run)
    thread.start()
    until(lambda: made.started)
    yield made
    made.should_exit = True
    thread.join()


@pytest.fixture
def port(server: uvicorn.Server) -> int:
    found: int = server.servers[0].sockets[0].getsockname()[1]
    return found


def exchange(port: int, *pieces: bytes) -> bytes:
    """Send pieces, then read until the reply is complete or the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    answer = b""
    while b"\r\n\r\nbody" not in answer:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        answer += piece
    return answer


def problem(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    decoded: dict[str, Any] = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % decoded["status"])
    return decoded


def test_a_head_within_the_bounds_is_accepted_in_any_pieces(port: int) -> None:
    whole = REQUEST % (b"X-A: " + b"a" * (LIMIT - 200) + b"\r\n")
    for cut in (1, 10, len(whole) - 3):
        assert exchange(port, whole[:cut], whole[cut:]).endswith(b"body")


@pytest.mark.parametrize(
    "head",
    [
        b"X-A: " + b"a" * LIMIT + b"\r\n",
        b"".join(b"X-%d: a\r\n" % i for i in range(LIMIT // 6)),
        b"X-A: " + b"a" * 10**5,
    ],
    ids=["one long", "many", "without an end"],
)
def test_a_larger_head_is_rejected(port: int, head: bytes) -> None:
    assert problem(exchange(port, REQUEST % head))["code"] == "head_too_large"


def test_the_path_counts_towards_the_head(port: int) -> None:
    assert problem(exchange(port, b"GET /" + b"a" * LIMIT + b" HTTP/1.1\r\nHost: x\r\n\r\n"))["status"] == 431


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GE"], ids=["nothing", "half", "a bit"])
def test_a_late_head_is_rejected(server: uvicorn.Server, port: int, begun: bytes) -> None:
    """The timer of the connection is fired by the test."""
    until(lambda: not server.server_state.connections)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(begun)
        until(lambda: [each._fed_bytes for each in server.server_state.connections] == [len(begun)])
        (protocol,) = server.server_state.connections
        assert 0 < protocol._late.when() - protocol.loop.time() < SECONDS + 1
        protocol.loop.call_soon_threadsafe(protocol._refuse_late)
        assert problem(read(connection))["code"] == "request_timeout"


def test_every_request_of_a_connection_is_bounded(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for _ in range(3):
            connection.sendall(REQUEST % b"")
            assert read(connection).endswith(b"body")
        connection.sendall(REQUEST % (b"X-A: " + b"a" * LIMIT + b"\r\n"))
        assert problem(read(connection))["status"] == 431


def test_the_body_does_not_count_towards_the_head(port: int) -> None:
    body = b"b" * 10 * LIMIT + b"\r\n\r\nbody"
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert exchange(port, request + body).count(b"b" * 10 * LIMIT) == 1


def test_malformed_http_gets_a_problem_document(port: int) -> None:
    assert problem(exchange(port, b"\x16\x03\x01 hello\r\n\r\n"))["code"] == "malformed"
