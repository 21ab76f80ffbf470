"""Heads, waiting and connections are bounded, and requests are framed as HTTP says, over real connections."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from app.http.protocol import Connections, HttpConnection, http_protocol
from app.settings import Settings
from tests.range_store.waiting import until

LIMIT, SECONDS = 2048, 600.0
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n%s\r\nbody"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body; at /early before it is read, at /large and /pieces with megabytes."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/pieces":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"30000000")]})
        for left in range(29, -1, -1):
            await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": left > 0})
        return
    body = b"x" * 30_000_000 if scope["path"] == "/large" else b""
    while scope["path"] == "/":
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(**bounds: Any) -> Iterator[uvicorn.Server]:
    """A server with these bounds."""
    own = Settings().model_copy(update={"max_header_bytes": LIMIT, "header_timeout": SECONDS, **bounds})
    protocol = http_protocol(own, CollectorRegistry())
    config = uvicorn.Config(echo, host="127.0.0.1", port=0, http=protocol, lifespan="off", log_level="critical")
    made = uvicorn.Server(config)
    thread = threading.Thread(target=made.run)
    thread.start()
    until(lambda: made.started)
    try:
        yield made
    finally:
        made.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[uvicorn.Server]:
    """A server that bounds the head of a request; nothing is late by itself."""
    with serving() as made:
        yield made


@pytest.fixture(scope="module")
def impatient() -> Iterator[uvicorn.Server]:
    """A server that waits only a moment for anything but a head."""
    moment = dict.fromkeys(("keep_alive", "body_timeout", "write_timeout"), 0.1)
    with serving(**moment) as made:
        yield made


def port_of(server: uvicorn.Server) -> int:
    found: int = server.servers[0].sockets[0].getsockname()[1]
    return found


def shared_of(server: uvicorn.Server) -> Connections:
    found: Connections = server.config.http_protocol_class.shared  # type: ignore[attr-defined]
    return found


def cut(server: uvicorn.Server, reason: str) -> float:
    """How many connections the server has ended for a reason."""
    value: float = shared_of(server).cut.labels(reason)._value.get()
    return value


def in_loop(server: uvicorn.Server, work: Callable[[HttpConnection], None]) -> None:
    """Run `work` on the server's thread with its only connection, and wait for it."""
    (connection,) = shared_of(server).open
    done = threading.Event()

    def call() -> None:
        work(connection)
        done.set()

    connection.loop.call_soon_threadsafe(call)
    assert done.wait(60)


@pytest.fixture(scope="module")
def port(server: uvicorn.Server) -> int:
    return port_of(server)


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
    until(lambda: not shared_of(server).open)
    with connected(port) as connection:
        connection.sendall(begun)
        until(lambda: [each._fed_bytes for each in shared_of(server).open] == [len(begun)])

        def fire(open_connection: HttpConnection) -> None:
            assert open_connection._timer is not None
            assert 0 < open_connection._timer.when() - open_connection.loop.time() < SECONDS + 1
            open_connection._refuse_late()

        in_loop(server, fire)
        assert problem(read(connection))["code"] == "request_timeout"
    assert cut(server, "late_head")


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


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def everything(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection; fails if it resets it."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def statuses(answer: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]


LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


# Framing

OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "TLS": b"Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0\r\n",
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("cut", ["one segment", "after the head", "within the head", "within the body"])
def test_an_offer_to_upgrade_is_ignored_and_the_body_is_read(port: int, offer: bytes, framing: str, cut: str) -> None:
    """The body looks like a request: it must not be taken for one."""
    body = b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n"
    length = b"Content-Length: %d\r\n" % len(body) if framing == "length" else b"Transfer-Encoding: chunked\r\n"
    sent = body if framing == "length" else b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = b"PUT / HTTP/1.1\r\nHost: x\r\n%s%s\r\n" % (offer, length)
    request = head + sent
    at = {"one segment": 0, "after the head": len(head), "within the head": 40, "within the body": len(head) + 9}[cut]
    with connected(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (request[:at], request[at:] + LAST) if at else (request + LAST,):
            connection.sendall(piece)
        answer = everything(connection)
    assert statuses(answer) == [200, 200]
    assert answer.count(body) == 1


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A request, and the body of its reply. Bodies look like requests, and some are not read before the reply."""
    body = draw(st.sampled_from([b"", b"x", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", b"0\r\n\r\n", b"y" * 3000]))
    path = draw(st.sampled_from([b"/", b"/", b"/early"]))
    offer = draw(st.sampled_from([b"", b"", *OFFERS.values()]))
    if draw(st.booleans()):
        size = draw(st.integers(1, len(body) + 1))
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        framing = b"Transfer-Encoding: chunked\r\n"
    else:
        sent, framing = body, b"Content-Length: %d\r\n" % len(body)
    request = b"POST %s HTTP/1.1\r\nHost: x\r\n%s%s\r\n%s" % (path, offer, framing, sent)
    return request, body if path == b"/" else b""


@given(made=st.lists(requests(), max_size=4), cuts=st.lists(st.floats(0, 1), max_size=4))
@settings(max_examples=40, deadline=None)
def test_requests_are_told_apart_however_they_arrive(
    port: int, made: list[tuple[bytes, bytes]], cuts: list[float]
) -> None:
    sent = b"".join(request for request, _ in made) + LAST
    places = sorted({int(cut * len(sent)) for cut in cuts} | {0, len(sent)})
    with connected(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in pairwise(places):
            connection.sendall(sent[begin:end])
        answer = everything(connection)
    for _, body in (*made, (b"", b"")):
        head, _, answer = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert (b"content-length: %d" % len(body)) in head.lower()
        assert answer.startswith(body)
        answer = answer[len(body) :]
    assert answer == b""


def test_connect_is_rejected(port: int) -> None:
    assert problem(exchange(port, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n"))["code"] == "malformed"


@pytest.mark.parametrize(
    "hosts", [b"", b"Host: x\r\nHost: y\r\n", b"Host: x\r\nhost: x\r\n"], ids=["none", "two", "same"]
)
def test_a_request_has_exactly_one_host(port: int, hosts: bytes) -> None:
    assert problem(exchange(port, b"GET / HTTP/1.1\r\n%s\r\n" % hosts))["code"] == "malformed"


def test_an_old_request_needs_no_host(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert statuses(everything(connection)) == [200]


@pytest.mark.parametrize(
    "framing",
    [
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n-1\r\n",
        b"Transfer-Encoding: gzip\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity\r\n\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_body_without_a_clear_end_is_rejected_in_words(port: int, framing: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + framing)
        assert problem(everything(connection))["code"] == "malformed"


@pytest.mark.parametrize("bad", [b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", b"\0: 1\r\n\r\n"], ids=["body", "head"])
def test_replies_to_earlier_requests_come_before_a_refusal(port: int, bad: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(REQUEST % b"" * 2 + b"POST / HTTP/1.1\r\nHost: x\r\n" + bad)
        assert statuses(everything(connection)) == [200, 200, 400]


def test_a_body_and_the_begin_of_the_next_head_may_share_a_segment(port: int) -> None:
    body = b"b" * 60_000
    first = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with connected(port) as connection:
        connection.sendall(first + LAST[:20])
        received = b""
        while not received.endswith(body):
            received += connection.recv(65536)
        connection.sendall(LAST[20:])
        assert statuses(received + everything(connection)) == [200, 200]


@pytest.mark.parametrize(
    "behind", [b"0;x=" + b"a" * 10**6, b"0\r\n" + b"X-T: a\r\n" * 10**5, b"0\r\nX-T: " + b"a" * 10**6]
)
def test_what_stands_around_chunks_is_bounded(port: int, behind: bytes) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(behind)
        assert problem(everything(connection))["code"] == "head_too_large"


# Waiting


@pytest.mark.parametrize(
    "sent",
    [
        REQUEST % b"",
        REQUEST % b"" + b"\r\n",
        REQUEST % b"" + b"\n",
        b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n",
        b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nb",
        b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody\r\n",
    ],
    ids=["idle", "CRLF", "LF", "no body", "half a body", "a body and CRLF"],
)
def test_an_answered_connection_ends_whatever_follows(impatient: uvicorn.Server, sent: bytes) -> None:
    with connected(port_of(impatient)) as connection:
        connection.sendall(sent)
        assert statuses(everything(connection)) == [200]


@pytest.mark.parametrize("path", [b"/large", b"/pieces"])
@pytest.mark.parametrize("connection_header", [b"", b"Connection: close\r\n"], ids=["kept", "closing"])
def test_a_reply_that_nobody_reads_ends(impatient: uvicorn.Server, connection_header: bytes, path: bytes) -> None:
    before = cut(impatient, "stalled_reader")
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port_of(impatient)))
        reader.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n" % (path, connection_header))
        until(lambda: cut(impatient, "stalled_reader") > before)
        until(lambda: not shared_of(impatient).open)


@pytest.fixture
def slow_reader() -> Iterator[tuple[uvicorn.Server, socket.socket, int]]:
    """A server for one connection, and a client that has read some of a reply in all the time that it has for that.

    The third value is how many bytes it has read. The timer of the connection is fired by the test.
    """
    with serving(write_timeout=SECONDS, max_connections=1) as server, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port_of(server)))
        reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        until(lambda: [each._write_timer is not None for each in shared_of(server).open] == [True])
        (connection,) = shared_of(server).open
        received = 0
        while connection._socket.get_write_buffer_size() >= connection._unwritten:
            received += len(reader.recv(4096))
        in_loop(server, lambda each: each._end_stalled())
        yield server, reader, received


def test_a_reply_that_is_read_slowly_arrives(slow_reader: tuple[uvicorn.Server, socket.socket, int]) -> None:
    server, reader, received = slow_reader
    in_loop(server, lambda each: each.shutdown())  # nor does a stopping server cut it off
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
    while piece := reader.recv(1_000_000):
        received += len(piece)
    assert received > 30_000_000
    assert cut(server, "stalled_reader") == 0


def test_a_slow_reader_makes_room_for_a_new_connection(slow_reader: tuple[uvicorn.Server, socket.socket, int]) -> None:
    server, _, _ = slow_reader
    assert exchange(port_of(server), REQUEST % b"").endswith(b"body")
    assert cut(server, "displaced") == 1


# Connections


def test_a_new_connection_displaces_the_one_that_is_idle_longest() -> None:
    with serving(max_connections=3) as server, ExitStack() as stack:
        idle = [stack.enter_context(connected(port_of(server))) for _ in range(3)]
        idle[0].sendall(REQUEST % b"")  # idle again, and since later than the others
        assert read(idle[0]).endswith(b"body")
        until(lambda: len(shared_of(server).open) == 3)
        assert exchange(port_of(server), REQUEST % b"").endswith(b"body")
        assert cut(server, "displaced") == 1
        assert idle[1].recv(1) == b"", "this one was idle longest"
        idle[0].sendall(LAST)
        assert statuses(everything(idle[0])) == [200]


def test_a_connection_is_refused_while_all_others_are_being_answered() -> None:
    with serving(max_connections=2) as server, ExitStack() as stack:
        busy = [stack.enter_context(connected(port_of(server))) for _ in range(2)]
        for each in busy:
            each.sendall((REQUEST % b"")[:-4])
        until(lambda: len(shared_of(server).open) == 2 and not shared_of(server).waiting)
        refused = problem(exchange(port_of(server)))
        assert (refused["status"], refused["code"]) == (503, "too_many_connections")
        for each in busy:
            each.sendall(b"body")
            assert read(each).endswith(b"body")
        assert exchange(port_of(server), REQUEST % b"").endswith(b"body")


# Stopping


def test_a_stopping_server_closes_each_connection_with_its_next_reply() -> None:
    with serving() as server, connected(port_of(server)) as connection:
        connection.sendall(REQUEST % b"")
        assert b"connection: close" not in read(connection)
        shared_of(server).draining = True
        connection.sendall(REQUEST % b"")
        assert b"connection: close" in everything(connection)


def test_a_request_that_arrived_before_the_close_is_answered() -> None:
    """It lies unread in the socket when the server closes idle connections."""
    with serving() as server, connected(port_of(server)) as connection:
        connection.sendall(REQUEST % b"")
        assert read(connection).endswith(b"body")

        def stop(open_connection: HttpConnection) -> None:
            shared_of(server).draining = True
            connection.sendall(REQUEST % b"")
            open_connection.shutdown()

        in_loop(server, stop)
        assert statuses(everything(connection)) == [200]


def test_an_idle_connection_is_closed_when_the_server_stops(server: uvicorn.Server) -> None:
    until(lambda: not shared_of(server).open)
    with connected(port_of(server)) as connection:
        connection.sendall(REQUEST % b"")
        assert read(connection).endswith(b"body")
        in_loop(server, lambda each: each.shutdown())
        assert connection.recv(1) == b""


def test_a_last_reply_arrives_though_the_client_is_still_sending(port: int) -> None:
    """A connection closed on unread data is reset, and what was written is lost with it."""
    head = b"POST /early HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000000\r\n\r\n"
    with connected(port) as connection:
        connection.sendall(head)
        connection.sendall(b"b" * 500_000)
        assert statuses(everything(connection)) == [200]
