"""Logs and traces of real server processes: complete, and free of what callers send."""

import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.cli import run
from app.observability.logs import FIELDS, configured
from app.settings import Settings
from tests.processes import Running
from tests.servers import RunningServer
from tests.workers.checkpoints import save_tiny

SECRET = "confession"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # pragma: allowlist secret
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
PAGE = Path(__file__).parents[2] / "docs" / "observing.md"


class Collector:
    """Receives traces by OTLP over HTTP, as a real collector does."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Any]:
        return [
            span
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


class ServeProcess(Running):
    """`neuronlens serve` in a process of its own."""

    def client(self) -> httpx.Client:
        address = self.says(self.stdout, "serving ").split()[-1]
        return httpx.Client(base_url=address, trust_env=False, timeout=60)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("observing") / "tiny-news")


@pytest.fixture
def serve(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """`serve("--access-log", OTEL_…="…")`: start a server; `code` is Python that runs before it."""
    with ExitStack() as stack:

        def start(*arguments: str, code: str = "", **environment: str) -> ServeProcess:
            options = ("--model", checkpoint, "--threads", "1", "--device", "cpu", "--port", "0")
            options += ("--data-dir", tmp_path / "data", *arguments)
            process = ServeProcess(["serve", *options], environment=environment, code=code)
            stack.callback(process.kill)
            return process

        yield start


def test_callers_cannot_write_into_logs_and_traces(
    serve: Callable[..., ServeProcess], collector: Collector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scopes = ("--scope", "infer", "--scope", "read")
    assert run(["keys", "create", "news-desk", *scopes, "--data-dir", str(tmp_path / "data")]) == 0
    token = capsys.readouterr().out.strip()
    served = serve(
        "--access-log", "--log-level", "debug",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_HEADERS=f"authorization=Bearer%20{SECRET}-of-the-operator",
        OTEL_SERVICE_NAME="news",
        OTEL_BSP_SCHEDULE_DELAY="100",
        FASTAPI_OTEL_AUTO_CONFIGURE="true",
    )  # fmt: skip
    forged = '{"level":"error"}'
    with served.client() as client:
        client.headers["X-API-Key"] = token
        own = {"traceparent": TRACEPARENT, "tracestate": f"a={SECRET}", "X-Request-ID": "own-1", "User-Agent": SECRET}
        body = {"inputs": [f"my {SECRET}\n{forged}", "\x1b[31m"]}
        good = client.post("/v1/classify", json=body, headers=own)
        assert good.status_code == 200
        for path in (f"/v1/concepts/{SECRET}/ranges", f"/{SECRET}%0A{forged}", f"/v1/concepts?{SECRET}=1"):
            assert client.get(path).status_code >= 400
        erased = {"inputs": SECRET, "erase": [SECRET]}
        assert client.post("/v1/classify", json=erased).status_code >= 400
        assert client.post("/v1/classify", content=f'{{"inputs": "{SECRET}'.encode()).status_code >= 400
        assert client.put(f"/v1/erasures/{SECRET}", json={"reason": SECRET}).status_code >= 400
        for name in ("X-Request-ID", "traceparent", "X-Forwarded-For", "baggage", "tracestate"):
            given = {name: f"{SECRET}=1" if name in ("baggage", "tracestate") else f"{SECRET} {forged}"}
            assert client.get("/v1/models", headers=given).status_code == 200
        assert client.request("GET", "/livez", headers={"traceparent": TRACEPARENT}).status_code == 200
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
            raw.sendall(f"{SECRET} / {SECRET}\r\n\r\n".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert served.stop() == 0

    lines = [json.loads(line) for line in served.stderr]
    for line in lines:
        assert {"timestamp", "level", "logger", "message"} <= line.keys() <= FIELDS.keys()
    assert SECRET not in "".join(served.stderr)
    assert token not in "".join(served.stderr)
    (answered,) = [line for line in lines if line.get("request_id") == "own-1" and "status" in line]
    assert answered["generation"] == good.json()["erasure"]["generation"]
    logged = {name: answered[name] for name in ("method", "route", "status", "texts", "key", "client", "trace_id")}
    assert logged == {
        "method": "POST", "route": "/v1/classify", "status": 200, "texts": 2, "key": "news-desk", "client": "127.0.0.1",
        "trace_id": TRACE,
    }  # fmt: skip
    assert sum(line["logger"] == "app.observability.requests" for line in lines) == 13
    assert all(re.fullmatch("[0-9a-f]{32}", each.get("request_id", "0" * 32)) or each is answered for each in lines)

    assert not any(SECRET.encode() in body or token.encode() in body for body in collector.bodies)
    assert all(each["authorization"].endswith("of-the-operator") for each in collector.headers)
    spans = collector.spans()
    (top,) = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert (top.trace_id.hex(), top.name) == (TRACE, "POST /v1/classify")
    assert good.headers["traceresponse"] == f"00-{TRACE}-{top.span_id.hex()}-01"
    assert answered["span_id"] == top.span_id.hex()
    (step,) = [span for span in spans if span.parent_span_id == top.span_id]
    attributes = {each.key: each.value for each in step.attributes}
    assert attributes["neuronlens.texts"].int_value == 2
    assert attributes["neuronlens.model"].string_value == good.json()["model"]
    assert attributes["neuronlens.tokens"].int_value == good.json()["usage"]["tokens"]
    assert attributes["neuronlens.generation"].string_value == answered["generation"]
    parts = {span.name: span for span in spans if span.parent_span_id == step.span_id}
    assert parts.keys() == {"queue", "model"}
    assert top.start_time_unix_nano <= step.start_time_unix_nano <= step.end_time_unix_nano <= top.end_time_unix_nano
    assert parts["queue"].start_time_unix_nano <= parts["model"].start_time_unix_nano
    documented = set(re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text("utf-8").partition("## Traces")[2], re.MULTILINE))
    assert {each.key for span in spans for each in span.attributes} <= documented
    others = [span for span in spans if span.trace_id != top.trace_id]
    assert len({span.trace_id for span in others}) == 11, "a request without a traceparent begins a trace of its own"
    assert not any("livez" in span.name for span in spans)


@contextmanager
def closed_port() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://user:{SECRET}@127.0.0.1:{held.getsockname()[1]}/{SECRET}?token={SECRET}"


@contextmanager
def silent_listener() -> Iterator[str]:
    """A collector that accepts connections and never replies."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/{SECRET}"


@pytest.mark.parametrize("unreachable", [closed_port, silent_listener])
def test_unreachable_collector_delays_neither_requests_nor_shutdown(
    serve: Callable[..., ServeProcess], unreachable: Callable[[], AbstractContextManager[str]]
) -> None:
    with unreachable() as url:
        served = serve(
            code="import app.observability.tracing; app.observability.tracing.FLUSH_SECONDS = 0.2",
            OTEL_EXPORTER_OTLP_ENDPOINT=url,
            OTEL_BSP_SCHEDULE_DELAY="50",
            OTEL_EXPORTER_OTLP_TIMEOUT="600",
        )
        with served.client() as client:
            for _ in range(5):
                assert client.post("/v1/classify", json={"inputs": "a text"}).status_code == 200
        assert served.stop() == 0  # `stop` gives up after 120 s, long before the timeout of the collector
    lines = [json.loads(line) for line in served.stderr]
    assert any(line["logger"] == "app.observability.tracing" for line in lines)
    assert not any("exception" in line for line in lines)
    assert SECRET not in "".join(served.stderr)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, "pip install '.[otel]'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "OTEL_"),
    ],
)
def test_unusable_trace_settings_are_one_line(
    environment: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if "pip" in says:  # as if the extra were not installed
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(["serve", "--model", "x", "--port", "0", "--data-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert SECRET not in line


def test_log_names_the_trace_of_the_caller_without_an_export(
    server: RunningServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine's thread logs about a failed text names the request, but not the text."""

    def fail(batch: Any) -> None:
        raise ValueError(batch[0].request.texts[0])

    with configured(Settings(log_format="json")):
        monkeypatch.setattr(server.service.engine._runner, "_forward", fail)
        failed = server.http.post("/v1/classify", json={"inputs": SECRET}, headers={"traceparent": TRACEPARENT})
        server.http.get("/livez")  # answered only after the request before it was logged
    assert failed.status_code == 500
    assert "traceresponse" not in failed.headers
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    about = [line for line in lines if line.get("request_id") == failed.headers["x-request-id"]]
    assert {"workers.engine.runner", "app.http.problems", "app.observability.requests"} <= {
        line["logger"] for line in about
    }
    assert {(line["trace_id"], line["span_id"]) for line in about} == {(TRACE, PARENT)}
    assert all(line["generation"] for line in about)
    assert SECRET not in json.dumps(lines)
