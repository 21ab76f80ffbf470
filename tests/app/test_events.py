"""Event streams over a real socket: readers that stop reading, and faults."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from app.http.middleware import Faults
from app.http.protocol import http_protocol
from app.live.event_stream import EventStream
from app.live.feed import KEPT_JOBS, ChangeFeed
from app.settings import Settings
from tests.range_store.waiting import until


class Flood:
    """An application that streams megabytes while `on`, and a server for it."""

    def __init__(self) -> None:
        self.feed = ChangeFeed(10, CollectorRegistry())
        self.on = True
        self.open = 0
        self.fault: Exception | None = None
        config = uvicorn.Config(
            self, port=0, http=http_protocol(Settings(), CollectorRegistry()), log_level="error", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.open += 1
        await Faults(EventStream(self.feed, self.messages, lambda: self.on))(scope, receive, send)
        self.open -= 1

    async def messages(self, woken: asyncio.Event) -> AsyncIterator[bytes]:
        while True:
            if self.fault is not None:
                raise self.fault
            yield b":" + b"x" * 1_000_000 + b"\n\n"

    def blocked(self) -> bool:
        """Whether the stream waits for its reader."""
        return any(connection.flow.write_paused for connection in self.server.server_state.connections)


@pytest.fixture
def flood(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flood]:
    monkeypatch.setattr("app.live.event_stream.TICK", 0.02)
    made = Flood()
    made.thread.start()
    until(lambda: made.server.started)
    yield made
    made.server.should_exit = True
    made.thread.join()


@pytest.mark.parametrize("reason", ["the stream must end", "out of patience"])
def test_a_stream_is_aborted_if_its_reader_stopped_reading(
    flood: Flood, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = flood.server.servers[0].sockets[0].getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as reader:
        reader.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        until(flood.blocked)
        assert flood.open == 1
        if reason == "out of patience":
            monkeypatch.setattr("app.live.event_stream.PATIENCE", 0.1)
        else:
            flood.on = False
        until(lambda: flood.open == 0 and not flood.server.server_state.connections)


def test_a_fault_breaks_the_stream_and_is_logged_without_its_message(
    flood: Flood, caplog: pytest.LogCaptureFixture
) -> None:
    flood.fault = ArithmeticError("what no log may hold")
    url = f"http://127.0.0.1:{flood.server.servers[0].sockets[0].getsockname()[1]}/"
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", url, timeout=60) as answer:
        answer.read()
    assert [record.message for record in caplog.records if record.name == "app.http.middleware"] == [
        "request None failed: ArithmeticError"
    ]


def test_the_number_of_kept_jobs_is_bounded(flood: Flood) -> None:
    flood.feed.set_jobs({f"job-{number}": b"{}" for number in range(KEPT_JOBS + 5)})
    assert list(flood.feed.jobs) == [f"job-{number}" for number in range(5, KEPT_JOBS + 5)]
