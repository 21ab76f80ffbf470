"""The port of its own for `/metrics` ends connections that stay silent."""

import socket

import pytest
from prometheus_client import CollectorRegistry

from app.metrics import start_metrics_server


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost"], ids=["nothing", "half a head"])
def test_a_silent_connection_ends(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.metrics._Silent.timeout", 0.05)
    server, thread = start_metrics_server(0, "127.0.0.1", CollectorRegistry(), ())
    try:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
            connection.sendall(sent)
            assert connection.recv(1) == b""
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert capsys.readouterr().err == ""
