"""Servers, a scripted HTTP server, a clock, and both clients behind one interface."""

import asyncio
import contextvars
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from neuronlens_client import AsyncClient, Client
from tests.servers import RunningServer, with_ranges
from workers.fitting.fit import FitResult


class Awaited:
    """An AsyncClient with blocking methods: each runs in one event loop, in the context of the caller."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client, self._runner = client, runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)

        def run(*args: Any, **named: Any) -> Any:
            result = found(*args, **named)
            if inspect.isasyncgen(result):
                return self._each(result)
            if not asyncio.iscoroutine(result):
                return result
            return self._runner.run(result, context=contextvars.copy_context())

        return run

    def _each(self, events: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._runner.run(anext(events))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(events.aclose())


@pytest.fixture(params=["sync", "async"])
def client_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`client_of(url, **options)`: a synchronous or asynchronous client; closed after the test."""
    monkeypatch.delenv("NEURONLENS_API_KEY", raising=False)
    with ExitStack() as stack:

        def make(url: str, *args: Any, **options: Any) -> Any:
            if request.param == "sync":
                return stack.enter_context(Client(url, *args, **options))
            runner = stack.enter_context(asyncio.Runner())
            client = AsyncClient(url, *args, **options)
            stack.callback(lambda: runner.run(client.aclose()))
            return Awaited(client, runner)

        yield make


@dataclass
class Clock:
    """The time of the clients: pauses end at once and move the clock; their random parts are at the maximum."""

    now: float = 1000.0
    pauses: list[float] = field(default_factory=list)
    on_pause: Callable[[], None] = lambda: None
    """Called during each pause."""

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        self.on_pause()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    async def sleep(seconds: float) -> None:
        made.sleep(seconds)
        await asyncio.sleep(0)

    for module in ("async_client", "call", "client", "base", "events"):
        monkeypatch.setattr(f"neuronlens_client.{module}.time", made)
    monkeypatch.setattr("neuronlens_client.async_client.asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    monkeypatch.setattr("neuronlens_client.call.random", SimpleNamespace(uniform=lambda low, high: high))
    return made


@dataclass(frozen=True)
class Received:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Scripted:
    """A server that gives its answers in turn and repeats the last one.

    An answer is (status, headers, JSON), a function from the request to that, or "cut": the connection is closed.
    """

    url: str = ""
    answers: list[Any] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    listen: Callable[[], None] = lambda: None
    """Accept connections from now on."""


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with answering() as script:
        script.listen()
        yield script


@contextmanager
def answering() -> Iterator[Scripted]:
    """A scripted server that refuses connections until `listen` is called."""
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with script.lock:
                script.received.append(Received(self.command, self.path, headers, json.loads(body) if body else None))
                answer = script.answers[0] if len(script.answers) == 1 else script.answers.pop(0)
                request = script.received[-1]
            if answer == "cut":
                self.close_connection = True
                return
            status, headers, content = answer(request) if callable(answer) else answer
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.server_bind()  # reserves the port
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})

    def listen() -> None:
        server.server_activate()
        thread.start()

    script.listen = listen
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        if thread.ident is not None:
            server.shutdown()
            thread.join()
        server.server_close()


def refusal(status: int, code: str, headers: dict[str, str] | None = None, **members: Any) -> Any:
    """An error answer, as the server writes it."""
    problem = {"status": status, "code": code, "detail": f"because of {code}", "request_id": "r", **members}
    return status, {"Content-Type": "application/problem+json", **(headers or {})}, problem


def classified(request: Received) -> Any:
    """A well-formed reply to `POST /v1/classify`: the label of each text is the text."""
    inputs = request.body["inputs"]
    score = [{"label": "A", "score": 1.0}]
    results = [
        {"label": text, "score": 1.0, "scores": score, "masked_neurons": 0, "truncated": False, "baseline": None}
        for text in ([inputs] if isinstance(inputs, str) else inputs)
    ]
    plan = {"source": "none", "concepts": [], "erasures": [], "range_set": None, "generation": "00000000-1"}
    return 200, {}, {"model": "m", "results": results, "erasure": plan, "usage": {"tokens": len(results)}}


LIVE = (200, {}, {"model": "m", "generation": "00000000-2", "range_set": None, "erasures": []})


@pytest.fixture(scope="module")
def start_shared(start_module_server: Callable[..., RunningServer]) -> Callable[..., RunningServer]:
    """`start_shared(**settings)`: a server of these settings, the same one for every test of the module."""
    found: dict[str, RunningServer] = {}

    def same(fitted: FitResult | None = None, **settings: Any) -> RunningServer:
        key = repr((fitted is None, settings))
        if key not in found:
            started = start_module_server(**settings)
            found[key] = with_ranges(started, fitted) if fitted else started
        return found[key]

    return same
