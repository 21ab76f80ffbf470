"""The port of its own for `/metrics` answers GET and HEAD, and ends connections that stay silent."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client import CollectorRegistry

from app.serving.metrics import start_metrics_server


@contextmanager
def serving() -> Iterator[int]:
    """The port of a server of metrics."""
    server, thread = start_metrics_server(0, "127.0.0.1", CollectorRegistry(), ())
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("path", ["/metrics", "/v1/replicas/targets"])
def test_head_answers_as_get_without_a_body(path: str) -> None:
    with serving() as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost"], ids=["nothing", "half a head"])
def test_a_silent_connection_ends(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.serving.metrics._Silent.timeout", 0.05)
    with serving() as port, socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b""
    assert capsys.readouterr().err == ""
