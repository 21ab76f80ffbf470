"""What routes do with a request before its endpoint sees it."""

import asyncio

import pytest
from starlette.routing import Match
from starlette.types import Message, Scope

from app.http.problems import ApiError
from app.http.routing import Route, RouteInfo
from app.main import create_app
from app.settings import Settings
from tests.app.asgi import send_request
from tests.app.openapi import application


def test_a_request_is_matched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matched = []
    matches = Route.matches

    def noting(self: Route, scope: Scope) -> tuple[Match, Scope]:
        found = matches(self, scope)
        if found[0] is Match.FULL:
            matched.append(self.path)
        return found

    monkeypatch.setattr(Route, "matches", noting)
    assert send_request(application(), method="GET", url="/livez").status_code == 200
    assert matched == ["/livez"]


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [("POST", "/v1/classify", True), ("PATCH", "/v1/classify", False), ("POST", "/v1/nothing", False)],
)
def test_a_request_is_refused_before_its_body_is_read(method: str, path: str, known: bool) -> None:
    seen: list[bool] = []
    sent: list[Message] = []

    def refuse(scope: Scope, route: RouteInfo | None) -> None:
        seen.append(route is not None)
        raise ApiError("no_key", "refused")

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    app = create_app(Settings())
    app.state.checks = [refuse]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "root_path": ""}
    asyncio.run(app(scope, receive, send))
    assert (seen, sent[0]["status"]) == ([known], 401)
