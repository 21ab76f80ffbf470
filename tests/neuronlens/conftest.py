"""A real server, a scripted one that answers badly first, and both clients behind one face."""

import asyncio
import contextvars
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from neuronlens import AsyncClient, Client


class Awaited:
    """An AsyncClient whose methods block: each runs in one event loop, in the caller's context."""

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
    """`client_of(url, **options)`: a client, blocking or not; closed after the test."""
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


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    at: float


@dataclass
class Scripted:
    """A server that answers what it is told to, in turn, and the last of it for ever after.

    An answer is (status, headers, JSON), or "cut": the connection is closed without one.
    """

    url: str = ""
    answers: list[Any] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with answering() as script:
        yield script


@contextmanager
def answering(after: float = 0.0) -> Iterator[Scripted]:
    """A scripted server, which refuses connections for the first `after` seconds."""
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            decoded = json.loads(body) if body else None
            with script.lock:
                script.asked.append(Asked(self.command, self.path, headers, decoded, time.monotonic()))
                answer = script.answers[0] if len(script.answers) == 1 else script.answers.pop(0)
            if answer == "cut":
                self.close_connection = True
                return
            if callable(answer):
                answer = answer(script.asked[-1])
            status, headers, content = answer
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(sent)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    def start_server() -> None:
        if after:
            time.sleep(after)
            server.server_activate()
        server.serve_forever(poll_interval=0.05)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.server_bind()  # its port is its own from now on
    server.daemon_threads = True
    if not after:
        server.server_activate()
    thread = threading.Thread(target=start_server)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refusal(status: int, code: str, headers: dict[str, str] | None = None, **members: Any) -> Any:
    """A problem as the server says it."""
    problem = {"status": status, "code": code, "detail": f"because of {code}", "request_id": "r", **members}
    return status, {"Content-Type": "application/problem+json", **(headers or {})}, problem


def classified(asked: Asked) -> Any:
    """A well-formed reply to `POST /v1/classify`: every text's label is the text."""
    given = asked.body["inputs"]
    score = [{"label": "A", "score": 1.0}]
    results = [
        {"label": text, "score": 1.0, "scores": score, "masked_neurons": 0, "truncated": False, "baseline": None}
        for text in ([given] if isinstance(given, str) else given)
    ]
    plan = {"source": "none", "concepts": [], "erasures": [], "range_set": None, "generation": "00000000-1"}
    return 200, {}, {"model": "m", "results": results, "erasure": plan, "usage": {"tokens": len(results)}}


LIVE = (200, {}, {"model": "m", "generation": "00000000-2", "range_set": None, "erasures": []})
