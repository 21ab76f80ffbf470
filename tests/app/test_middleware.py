"""The layers around the application, each alone around the smallest application that shows it."""

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


def ask(app: ASGIApp, **request: object) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(**{"method": "POST", "url": "/", **request})  # type: ignore[arg-type]

    return asyncio.run(once())


@pytest.mark.parametrize("given", ["a", "a" * 128, "0af7:651-9_x.Y"])
def test_a_sane_request_id_is_kept(given: str) -> None:
    assert ask(RequestId(echo), headers={"X-Request-ID": given}).headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "a;b", 'a"', "é"])
def test_another_one_is_replaced(given: str) -> None:
    (made,) = ask(RequestId(echo), headers={"X-Request-ID": given.encode()}).headers.get_list("x-request-id")
    assert len(made) == 32
    assert made.isalnum()


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:8000"])
def test_loopback_names_come_in(host: str) -> None:
    app = HostCheck(echo, ("localhost", "127.0.0.1", "::1"))
    assert ask(app, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", "::1"]
)
def test_other_names_stay_outside(host: str) -> None:
    refused = ask(HostCheck(echo, ("localhost", "127.0.0.1", "::1")), headers={"Host": host})
    assert (refused.status_code, refused.json()["code"]) == (421, "wrong_host")


@pytest.mark.parametrize(("size", "status"), [(0, 200), (100, 200), (101, 413)])
def test_a_body_has_a_limit_to_the_byte(size: int, status: int) -> None:
    assert ask(BodyLimit(echo, 100, 5), content=b"x" * size).status_code == status


def failing(started: bool) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("what a user wrote")

    return app


def test_a_fault_is_answered_and_its_message_kept_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    reply = ask(RequestId(Faults(failing(started=False))), headers={"X-Request-ID": "f-1"})
    assert (reply.status_code, reply.json()["code"], reply.json()["request_id"]) == (500, "internal", "f-1")
    assert "request f-1 failed: ValueError" in caplog.text
    assert "wrote" not in caplog.text.replace('ValueError("what a user wrote")', "")  # the line of code, quoted


def test_a_fault_half_way_breaks_the_connection() -> None:
    with pytest.raises(ConnectionAbortedError):
        ask(Faults(failing(started=True)))


@pytest.mark.parametrize(("app", "status"), [(echo, "200"), (failing(started=False), "500")])
def test_every_request_is_counted_under_bounded_labels(app: ASGIApp, status: str) -> None:
    registry = CollectorRegistry()
    counted: Callable[..., float | None] = registry.get_sample_value
    measured = HttpMetrics(Faults(app), registry)
    for method in ("POST", "BREW"):
        ask(measured, method=method, url="/private/path")
    for label in ("POST", "other"):
        labels = {"method": label, "route": "unmatched"}
        assert counted("neuronlens_http_requests_total", labels | {"status": status}) == 1
        assert counted("neuronlens_http_request_seconds_count", labels | {"status_class": f"{status[0]}xx"}) == 1
    assert counted("neuronlens_http_requests_in_flight") == 0


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def once() -> list[dict[str, object]]:
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            if not sent_body:
                sent_body.append(True)
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.sleep(60)
            raise AssertionError("it waited on")

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


def test_what_comes_after_a_body_may_take_its_time() -> None:
    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"  # as a request that waits for its answer looks out for it

    async def once() -> None:
        async def receive() -> dict[str, object]:
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.sleep(0.2)
            return {"type": "http.disconnect"}

        asked: list[bool] = []
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {}}
        await BodyLimit(patient, 100, 0.05)(scope, receive, None)  # type: ignore[arg-type]

    asyncio.run(once())


def test_failures_of_what_alerts_watch_are_counted_from_zero_on() -> None:
    """Else the first burst of them, which makes the series, would be no increase of it."""
    registry = CollectorRegistry()
    HttpMetrics(echo, registry, ["/v1/classify", "/predict"])
    for route in ("/v1/classify", "/predict"):
        labels = {"method": "POST", "route": route}
        for status in ("200", "424", "429", "500", "503", "504"):
            assert registry.get_sample_value("neuronlens_http_requests_total", labels | {"status": status}) == 0
        answered = labels | {"status_class": "2xx"}
        assert registry.get_sample_value("neuronlens_http_request_seconds_count", answered) == 0
