"""How a protocol says that something failed: the members that its clients look for, beside those of a problem."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problems import MEDIA_TYPE, Problem

JSON = "application/json"


@dataclass(frozen=True)
class Dialect:
    """A protocol's errors.

    schema: a problem with the protocol's members.
    say: from a problem's members to the protocol's status and its members, which go before the problem's.
    without: statuses that this protocol has others for.
    """

    schema: type[Problem]
    say: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
    without: frozenset[int] = frozenset()


class Dialects:
    """Puts every problem below a protocol's paths into that protocol's words, whichever layer it came from."""

    def __init__(self, app: ASGIApp, dialect_of: Callable[[Scope], Dialect | None]) -> None:
        self.app = app
        self.dialect_of = dialect_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.dialect_of(scope) is None:
            await self.app(scope, receive, send)
            return
        held: Message | None = None
        body = b""

        async def translate(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start" and Headers(scope=message).get("content-type") == MEDIA_TYPE:
                held = message
                return
            if held is None:
                await send(message)
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            dialect = self.dialect_of(scope)  # once more: the body may have told which protocol it is
            assert dialect is not None
            status, said = _said(dialect, json.loads(body))
            held["status"] = status
            headers = MutableHeaders(scope=held)
            headers["content-type"], headers["content-length"] = JSON, str(len(said))
            await send(held)
            await send({"type": "http.response.body", "body": said})

        await self.app(scope, receive, translate)


def _said(dialect: Dialect, problem: dict[str, Any]) -> tuple[int, bytes]:
    status, members = dialect.say(problem)
    same = {"status": status, "title": HTTPStatus(status).phrase}
    return status, json.dumps({**members, **problem, **same}, separators=(",", ":")).encode()


def document(operation: dict[str, Any], *dialects: Dialect) -> None:
    """Say in the OpenAPI document in which words an operation refuses."""
    for status in dialects[0].without:
        operation["responses"].pop(str(status), None)
    schemas = [{"$ref": f"#/components/schemas/{each.schema.__name__}"} for each in dialects]
    said = {JSON: {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            plain = response["content"] if int(status) in FROM_THE_PARSER else {}
            operation["responses"][status] = {**response, "content": plain | said}  # others share the response


FROM_THE_PARSER = (408, 431)
"""Refused before there is a path: these may be plain problems."""
