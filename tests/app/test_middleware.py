"""Each middleware around a minimal application."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from app.middleware import BodyLimit, Faults, HostCheck, HttpMetrics, RequestId


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = b""
    while (message := await receive()).get("more_body") or message["type"] == "http.request":
        body += message["body"]
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def send_request(app: ASGIApp, **request: object) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(**{"method": "POST", "url": "/", **request})  # type: ignore[arg-type]

    return asyncio.run(once())


@pytest.mark.parametrize("given", ["a", "a" * 128, "0af7:651-9_x.Y"])
def test_a_valid_request_id_is_kept(given: str) -> None:
    assert send_request(RequestId(echo), headers={"X-Request-ID": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "a;b", 'a"', "é"])
def test_an_invalid_request_id_is_replaced(given: str) -> None:
    (made,) = send_request(RequestId(echo), headers={"X-Request-ID": given.encode()}).headers.get_list("x-request-id")
    assert len(made) == 32
    assert made.isalnum()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000"])
def test_loopback_hosts_are_accepted(host: str) -> None:
    app = HostCheck(echo, ("localhost", "127.0.0.1", "::1"))
    assert send_request(app, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", "::1"]
)
def test_other_hosts_are_rejected(host: str) -> None:
    refused = send_request(HostCheck(echo, ("localhost", "127.0.0.1", "::1")), headers={"Host": host})
    assert (refused.status_code, refused.json()["code"]) == (421, "wrong_host")


@pytest.mark.parametrize(("size", "status"), [(0, 200), (100, 200), (101, 413)])
def test_the_limit_of_a_body_is_exact(size: int, status: int) -> None:
    assert send_request(BodyLimit(echo, 100, 60), content=b"x" * size).status_code == status


def failing(started: bool) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("what a user wrote")

    return app


def test_a_fault_is_answered_and_logged_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    reply = send_request(RequestId(Faults(failing(started=False))), headers={"X-Request-ID": "f-1"})
    assert (reply.status_code, reply.json()["code"], reply.json()["request_id"]) == (500, "internal", "f-1")
    assert "request f-1 failed: ValueError" in caplog.text
    code = 'ValueError("what a user wrote")'  # the traceback quotes the line of code
    assert "wrote" not in caplog.text.replace(code, "")


def test_a_fault_after_the_start_of_a_reply_breaks_the_connection() -> None:
    with pytest.raises(ConnectionAbortedError):
        send_request(Faults(failing(started=True)))


@pytest.mark.parametrize(("app", "status"), [(echo, "200"), (failing(started=False), "500")])
def test_requests_are_counted_with_bounded_labels(app: ASGIApp, status: str) -> None:
    registry = CollectorRegistry()
    counted: Callable[..., float | None] = registry.get_sample_value
    measured = HttpMetrics(Faults(app), registry)
    for method in ("POST", "BREW"):
        send_request(measured, method=method, url="/private/path")
    for label in ("POST", "other"):
        labels = {"method": label, "route": "unmatched"}
        assert counted("neuronlens_http_requests_total", labels | {"status": status}) == 1
        assert counted("neuronlens_http_request_seconds_count", labels | {"status_class": f"{status[0]}xx"}) == 1
    assert counted("neuronlens_http_requests_in_flight") == 0


def test_a_body_that_does_not_arrive_is_a_timeout() -> None:
    async def once() -> list[dict[str, object]]:
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            if not sent_body:
                sent_body.append(True)
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.sleep(60)
            raise AssertionError("the timeout did not end the wait")

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        sent_body: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {}}
        with pytest.raises(HTTPException) as caught:
            await BodyLimit(echo, 100, 0.05)(scope, receive, send)  # type: ignore[arg-type]
        assert caught.value.status_code == 408
        assert caught.value.headers == {"Connection": "close"}
        return sent

    assert asyncio.run(once()) == []


def test_the_timeout_of_a_body_ends_with_the_body() -> None:
    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"  # a request that is being answered waits for this

    async def once() -> None:
        async def receive() -> dict[str, object]:
            if not received:
                received.append(True)
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        received: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {}}
        await BodyLimit(waiting, 100, 0.01)(scope, receive, None)  # type: ignore[arg-type]

    asyncio.run(once())


def test_counters_of_failures_start_at_zero() -> None:
    """Alerts on an increase would miss the first failures of a series that starts with them."""
    registry = CollectorRegistry()
    HttpMetrics(echo, registry, ["/v1/classify", "/predict"])
    for route in ("/v1/classify", "/predict"):
        labels = {"method": "POST", "route": route}
        for status in ("200", "424", "429", "500", "503", "504"):
            assert registry.get_sample_value("neuronlens_http_requests_total", labels | {"status": status}) == 0
        answered = labels | {"status_class": "2xx"}
        assert registry.get_sample_value("neuronlens_http_request_seconds_count", answered) == 0
