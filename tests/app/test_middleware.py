"""Each middleware around a minimal application."""

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.middleware import Faults, HostCheck
from app.observability.requests import RequestObserver
from tests.app.asgi import echo, send_request


def observed(app: ASGIApp) -> ASGIApp:
    return RequestObserver(app, CollectorRegistry())


@pytest.mark.parametrize("given", ["a", "a" * 128, "0af7:651-9_x.Y"])
def test_a_valid_request_id_is_kept(given: str) -> None:
    assert send_request(observed(echo), headers={"X-Request-ID": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "a;b", 'a"', "é"])
def test_an_invalid_request_id_is_replaced(given: str) -> None:
    (made,) = send_request(observed(echo), headers={"X-Request-ID": given.encode()}).headers.get_list("x-request-id")
    assert len(made) == 32
    assert made.isalnum()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000"])
def test_loopback_hosts_are_accepted(host: str) -> None:
    app = HostCheck(echo, ("localhost", "127.0.0.1", "::1"))
    assert send_request(app, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::2]",
        "::1",
        "localhost:8000@evil.example",
        "localhost@evil.example",
        "[::1]x.evil.example",
        "[::1].evil.example:80",
        "[localhost]",
        "localhost:80:80",
        "localhost:x",
        "localhost/evil.example",
        "localhost, evil.example",
    ],
)
def test_other_hosts_are_rejected(host: str) -> None:
    refused = send_request(HostCheck(echo, ("localhost", "127.0.0.1", "::1")), headers={"Host": host})
    assert (refused.status_code, refused.json()["code"]) == (421, "wrong_host")


def failing(started: bool) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("what a user wrote")

    return app


def test_a_fault_is_answered_and_logged_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    reply = send_request(observed(Faults(failing(started=False))), headers={"X-Request-ID": "f-1"})
    assert (reply.status_code, reply.json()["code"], reply.json()["request_id"]) == (500, "internal", "f-1")
    assert "request f-1 failed: ValueError" in caplog.text
    code = 'ValueError("what a user wrote")'  # the traceback quotes the line of code
    assert "wrote" not in caplog.text.replace(code, "")


def test_a_fault_after_the_start_of_a_reply_breaks_the_connection() -> None:
    with pytest.raises(ConnectionAbortedError):
        send_request(Faults(failing(started=True)))


def test_two_hosts_are_rejected() -> None:
    for second in ("evil.example", "localhost"):
        app = HostCheck(echo, ("localhost",))
        assert send_request(app, headers=[("Host", "localhost"), ("Host", second)]).status_code == 421


@pytest.mark.parametrize(("app", "status"), [(echo, "200"), (failing(started=False), "500")])
def test_requests_are_counted_with_bounded_labels(app: ASGIApp, status: str) -> None:
    registry = CollectorRegistry()
    counted: Callable[..., float | None] = registry.get_sample_value
    measured = RequestObserver(Faults(app), registry)
    for method in ("POST", "BREW"):
        send_request(measured, method=method, url="/private/path")
    for label in ("POST", "other"):
        labels = {"method": label, "route": "unmatched"}
        assert counted("neuronlens_http_requests_total", labels | {"status": status}) == 1
        assert counted("neuronlens_http_request_seconds_count", labels | {"status_class": f"{status[0]}xx"}) == 1
    assert counted("neuronlens_http_requests_in_flight") == 0


def test_counters_of_failures_start_at_zero() -> None:
    """Alerts on an increase would miss the first failures of a series that starts with them."""
    registry = CollectorRegistry()
    RequestObserver(echo, registry, alerted=["/v1/classify", "/predict"])
    for route in ("/v1/classify", "/predict"):
        labels = {"method": "POST", "route": route}
        for status in ("200", "424", "429", "500", "503", "504"):
            assert registry.get_sample_value("neuronlens_http_requests_total", labels | {"status": status}) == 0
        answered = labels | {"status_class": "2xx"}
        assert registry.get_sample_value("neuronlens_http_request_seconds_count", answered) == 0
