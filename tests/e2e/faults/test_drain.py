"""A server is told to stop while it has work (DESIGN promise 7): what was accepted is answered, what is new is told."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.faults.processes import Served
from tests.e2e.listening import Listener
from tests.processes import end_redis
from tests.range_store.waiting import until
from workers.models.loading import LoadedModel

TEXTS = ["the keeper saved a penalty and the striker limped off in the first half of the final " * 3] * 700
REQUESTS = 3
Start = Callable[..., Served]


@pytest.fixture
def start(model: LoadedModel, tmp_path: Path) -> Iterator[Start]:
    """`start("--drain-delay", 1, NEURONLENS_DRAIN_SECONDS="1")`: a server with room for all the work of these tests."""
    started: list[Served] = []

    def served(*more: object, **environment: str) -> Served:
        room = {"NEURONLENS_MAX_QUEUE_TOKENS": "10000000", "NEURONLENS_MAX_QUEUE_SECONDS": "1000"}
        room |= {"NEURONLENS_DRAIN_SECONDS": "300", "NEURONLENS_REQUEST_TIMEOUT": "300"}  # of a busy machine
        options = ["--data-dir", tmp_path, "--max-batch-tokens", "64"]
        started.append(Served(model.source, None, *options, *more, **{**room, **environment}))
        return started[-1]

    yield served
    for each in started:
        each.close()
    end_redis(tmp_path / "redis")


def busy(served: Served, pool: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """Requests that are accepted, and take many seconds; returns when all of them are."""

    def ask() -> httpx.Response:
        body = {"inputs": TEXTS, "erase": []}
        return httpx.post(f"{served.url}/v1/classify", json=body, timeout=300, trust_env=False)

    asked = [pool.submit(ask) for _ in range(REQUESTS)]
    until(lambda: served.metric('neuronlens_stage_seconds_count{stage="tokenize"}') >= REQUESTS)
    assert served.metric("neuronlens_queue_texts") > len(TEXTS), "give it more to do"
    return asked


def one(served: Served, method: str, path: str, **more: object) -> httpx.Response:
    """A request on a connection of its own."""
    return httpx.request(method, f"{served.url}{path}", trust_env=False, timeout=30, **more)  # type: ignore[arg-type]


def closes_what_is_idle(served: Served) -> bool:
    """Whether a connection on which a request was answered is closed by the server."""
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        said = b""
        while more := connection.recv(65536):
            said += more
    return said.startswith(b"HTTP/1.1 200 ")


def answered(asked: Future[httpx.Response]) -> bool:
    """Whether a request was; waits until it ended."""
    return asked.exception() is None and asked.result().status_code == 200


def is_draining(served: Served) -> None:
    ready = one(served, "GET", "/readyz")
    assert (ready.status_code, ready.json()["checks"]["engine"]) == (503, False)
    refused = one(served, "POST", "/v1/classify", json={"inputs": "new"})
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    assert refused.headers["Connection"] == "close"
    assert int(refused.headers["Retry-After"]) >= 1
    assert one(served, "GET", "/livez").status_code == 200


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_server_under_load_answers_what_it_accepted_and_tells_the_others(start: Start, stop: signal.Signals) -> None:
    """Ctrl-C does not wait for load balancers: it ends as soon as there is nothing left to answer."""
    served = start(**({"NEURONLENS_DRAIN_DELAY": "100"} if stop == signal.SIGINT else {}))
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = busy(served, pool)
        served.command.process.send_signal(stop)
        until(lambda: one(served, "GET", "/readyz").json()["checks"]["engine"] is False)
        is_draining(served)
        old = served.http.post("/v1/classify", json={"inputs": "on a connection that was open before"})
        assert (old.status_code, old.json()["code"]) == (503, "draining")
        for each in asked:
            answer = each.result()
            assert answer.status_code == 200
            assert len(answer.json()["results"]) == len(TEXTS)
    ended = time.monotonic()
    assert served.command.end() == 0
    assert time.monotonic() - ended < 60
    assert "what was accepted is answered" in served.command.stderr[-1]
    assert "Traceback" not in "".join(served.command.stderr)


def test_after_sigterm_an_idle_server_stays_long_enough_to_be_seen_not_ready(start: Start) -> None:
    served = start("--drain-delay", "10", NEURONLENS_KEEP_ALIVE="1")
    assert closes_what_is_idle(served)
    began = time.monotonic()
    served.command.process.send_signal(signal.SIGTERM)
    until(lambda: one(served, "GET", "/readyz").json()["checks"]["engine"] is False)
    is_draining(served)
    assert served.command.end() == 0
    assert time.monotonic() - began >= 10


def test_a_second_signal_ends_it_at_once_and_says_what_it_cost(start: Start) -> None:
    served = start()
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = busy(served, pool)
        served.command.process.send_signal(signal.SIGTERM)
        until(lambda: one(served, "GET", "/readyz").json()["checks"]["engine"] is False)
        served.command.process.send_signal(signal.SIGTERM)
        assert served.command.end() == 130
        cut_off = sum(not answered(each) for each in asked)
    assert cut_off >= 1
    assert served.command.stderr[-1] == f"error: stopped at once by a second signal; not answered: {cut_off}\n"


def test_what_takes_longer_than_the_drain_time_is_cut_off_and_counted(start: Start) -> None:
    served = start(NEURONLENS_DRAIN_SECONDS="0")
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = busy(served, pool)
        served.command.process.send_signal(signal.SIGTERM)
        assert served.command.end() == 1
        cut_off = sum(not answered(each) for each in asked)
    assert cut_off >= 1
    assert f"not answered within 0 s: {cut_off};" in served.command.stderr[-1]


def test_open_streams_do_not_hold_a_server_that_stops(start: Start) -> None:
    """Neither one that is read, which ends as a whole reply, nor one whose reader has stopped reading."""
    served = start()
    with Listener(served.url) as window, socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect((httpx.URL(served.url).host, httpx.URL(served.url).port))
        stuck.sendall(b"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        until(lambda: window.of("live") and served.metric("neuronlens_event_streams") == 2)
        served.command.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert served.command.end() == 0, served.command.stderr
        assert time.monotonic() - began < 60, "the streams were waited for until the drain's end"
        until(lambda: window.ended == "whole")
        assert not any("error" in line.lower() for line in served.command.stderr), served.command.stderr
