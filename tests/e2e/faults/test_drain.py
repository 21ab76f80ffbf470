"""A server that is told to stop answers the requests that it accepted, and refuses new ones with 503."""

import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.e2e.faults.processes import TEXTS, RedisProcess, Served
from tests.e2e.listening import Listener
from tests.range_store.waiting import until
from workers.models.loading import LoadedModel

REQUESTS = 3
FOREVER = 3600.0
"""Seconds: a test that waited for them would fail by its time limit."""

HOLD_BATCHES = """
import time
from pathlib import Path
from workers.engine.runner import BatchRunner

answer = BatchRunner.answer

def answer_when_released(self, batch):
    while not Path({release!r}).exists() and not all(text.abandoned for text in batch):
        time.sleep(0.01)
    answer(self, batch)

BatchRunner.answer = answer_when_released
"""
"""Makes the engine answer nothing until a file exists: requests take as long as the test wants."""


@dataclass
class HoldingServer:
    """A server process whose requests stay in flight until `release`."""

    server: Served
    release_file: Path

    def send_requests(self, pool: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
        """Send requests, and wait until all of them are accepted."""
        sent = [
            pool.submit(self.request, "POST", "/v1/classify", {"inputs": TEXTS, "erase": []}) for _ in range(REQUESTS)
        ]
        until(lambda: self.server.metric('neuronlens_stage_seconds_count{stage="tokenize"}') == REQUESTS)
        return sent

    def release(self) -> None:
        """Let the engine answer."""
        self.release_file.touch()

    def signal(self, number: signal.Signals) -> None:
        self.server.command.process.send_signal(number)

    def request(self, method: str, path: str, body: object = None) -> httpx.Response:
        """Send a request on a connection of its own."""
        return httpx.request(method, f"{self.server.url}{path}", json=body, timeout=FOREVER, trust_env=False)

    def wait_until_draining(self) -> None:
        """Wait until it is not ready; then new requests are refused, and say so."""
        until(lambda: self.request("GET", "/readyz").json()["checks"]["engine"] is False)
        assert self.request("GET", "/readyz").status_code == 503
        refused = self.request("POST", "/v1/classify", {"inputs": "new"})
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert refused.headers["Connection"] == "close"
        assert int(refused.headers["Retry-After"]) >= 1
        alive = self.request("GET", "/livez")
        assert (alive.status_code, alive.headers["Connection"]) == (200, "close")


@pytest.fixture
def start(model: LoadedModel, redis_process: RedisProcess, tmp_path: Path) -> Iterator[Callable[..., HoldingServer]]:
    """`start("--drain-delay", 1, NEURONLENS_DRAIN_SECONDS="0")`: a server whose requests are held."""
    with ExitStack() as stack:

        def holding(*options: object, **environment: str) -> HoldingServer:
            release = tmp_path / uuid.uuid4().hex
            patient = {"NEURONLENS_DRAIN_SECONDS": str(int(FOREVER)), "NEURONLENS_REQUEST_TIMEOUT": str(FOREVER)}
            server = Served(
                model.source,
                redis_process.url,
                *("--data-dir", tmp_path, "--name", f"drain-{release.name}"),
                *options,
                code=HOLD_BATCHES.format(release=str(release)),
                **{**patient, **environment},
            )
            stack.callback(server.close)
            return HoldingServer(server, release)

        yield holding


def is_answered(sent: Future[httpx.Response]) -> bool:
    """Whether a request got an answer; waits until its connection ends."""
    return sent.exception() is None and sent.result().status_code == 200


def server_closes_idle_connection(server: Served) -> bool:
    """Whether the server closes a connection on which it has answered a request."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        received = b""
        while more := connection.recv(65536):
            received += more
    return received.startswith(b"HTTP/1.1 200 ")


def test_sigterm_drains_and_keeps_listening_for_the_drain_delay(start: Callable[..., HoldingServer]) -> None:
    holding = start("--drain-delay", FOREVER, NEURONLENS_KEEP_ALIVE="1")
    server = holding.server
    assert server_closes_idle_connection(server)
    with ThreadPoolExecutor(REQUESTS) as pool:
        sent = holding.send_requests(pool)
        holding.signal(signal.SIGTERM)
        holding.wait_until_draining()
        assert not any(each.done() for each in sent)
        holding.release()
        for each in sent:
            assert each.result().status_code == 200
            assert len(each.result().json()["results"]) == len(TEXTS)
    holding.wait_until_draining()
    assert server.command.process.poll() is None
    holding.signal(signal.SIGTERM)
    assert server.command.end() == 0, "the second signal ends the delay, and no request was cut off"


def test_sigint_ends_the_server_once_accepted_requests_are_answered(start: Callable[..., HoldingServer]) -> None:
    """Ctrl-C does not wait for load balancers: the drain delay does not apply."""
    holding = start(NEURONLENS_DRAIN_DELAY=str(FOREVER), NEURONLENS_KEEP_ALIVE=str(int(FOREVER)))
    server = holding.server
    with ThreadPoolExecutor(REQUESTS) as pool:
        sent = holding.send_requests(pool)
        holding.signal(signal.SIGINT)
        holding.wait_until_draining()
        refused = server.http.post("/v1/classify", json={"inputs": "on a connection that was open before"})
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        holding.release()
        assert all(is_answered(each) for each in sent)
    assert server.command.end() == 0
    assert "all accepted requests are answered" in server.command.stderr[-1]
    assert "Traceback" not in "".join(server.command.stderr)


def test_second_signal_ends_the_server_and_reports_requests_cut_off(start: Callable[..., HoldingServer]) -> None:
    holding = start()
    with ThreadPoolExecutor(REQUESTS) as pool:
        sent = holding.send_requests(pool)
        holding.signal(signal.SIGTERM)
        holding.wait_until_draining()
        holding.signal(signal.SIGTERM)
        assert holding.server.command.end() == 130
        assert not any(is_answered(each) for each in sent)
    said = holding.server.command.stderr[-1]
    assert said == f"error: stopped by a second signal; requests not answered: {REQUESTS}\n"


def test_requests_are_cut_off_after_the_drain_time_and_reported(start: Callable[..., HoldingServer]) -> None:
    holding = start(NEURONLENS_DRAIN_SECONDS="0")
    with ThreadPoolExecutor(REQUESTS) as pool:
        sent = holding.send_requests(pool)
        holding.signal(signal.SIGTERM)
        assert holding.server.command.end() == 1
        assert not any(is_answered(each) for each in sent)
    assert f"not answered within 0 s: {REQUESTS};" in holding.server.command.stderr[-1]


def test_open_event_streams_do_not_delay_the_end(start: Callable[..., HoldingServer]) -> None:
    """Neither a stream that is read, which ends as a whole reply, nor one whose client has stopped reading."""
    delay = 0.5
    holding = start("--drain-delay", delay)
    server = holding.server
    with Listener(server.url) as listener, socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect((httpx.URL(server.url).host, httpx.URL(server.url).port))
        stuck.sendall(b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        until(lambda: listener.of("live") and server.metric("neuronlens_event_streams") == 2)
        began = time.monotonic()
        holding.signal(signal.SIGTERM)
        assert server.command.end() == 0, server.command.stderr
        assert time.monotonic() - began >= delay
        until(lambda: listener.ended == "complete")
        assert not any("error" in line.lower() for line in server.command.stderr), server.command.stderr
