"""The scope that each call requires, also in the documentation and the OpenAPI document."""

import re
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from app.http.routing import Route
from app.rates import rate
from app.security.auth import token_of
from tests.app.openapi import application, key_scope_of, operations

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "WHATEVER"])
@pytest.mark.parametrize(
    "path", ["/console", "/v1", "/v1/", "/v2/x", "/metrics/", "/livez/..", "/v1/classify/", "/docsx", ""]
)
def test_unknown_calls_require_a_key(method: str, path: str) -> None:
    assert key_scope_of(method, path) is not None


def test_the_console_is_open_for_reading_only() -> None:
    for path in ("/", "/console/main.js"):
        scopes = {method: key_scope_of(method, path) for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")}
        assert {method for method, scope in scopes.items() if scope is None} == {"GET", "HEAD"}


def test_only_pages_of_the_documentation_have_no_metadata() -> None:
    """A route without metadata would be open to everyone."""
    others = [route for route in application().routes if not isinstance(route, Route)]
    assert {getattr(route, "path", "").split("/")[1] for route in others} == {
        "docs",
        "openapi.json",
        "static-offline-docs",
    }


def test_the_openapi_document_names_the_scope_of_every_call() -> None:
    for call, operation in operations().items():
        scope = key_scope_of(*call)
        expected = None if scope is None else [{"bearer": [scope]}, {"apiKey": [scope]}]
        assert operation.get("security") == expected, call


def test_changes_require_admin_and_reading_does_not() -> None:
    scopes = {call: key_scope_of(*call) for call in operations()}
    assert {call for call, scope in scopes.items() if scope is None} == {
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/health"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
    }
    assert {call for call, scope in scopes.items() if scope == "infer"} == {
        ("POST", "/v1/classify"),
        ("POST", "/"),
        ("POST", "/predict"),
        ("POST", "/v1/tokenize"),
        ("POST", "/v1/activations"),
        ("POST", "/classify"),
        ("POST", "/tokenize"),
        ("POST", "/v2/models/{model}/infer"),
        ("POST", "/v2/models/{model}/versions/{model_version}/infer"),
    }
    assert {scope for (method, _), scope in scopes.items() if method in ("PUT", "DELETE")} == {"admin"}


def test_the_page_lists_every_call_with_its_scope() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    listed = {
        (method, path): scope if scope != "open" else None
        for scope, calls in rows
        if scope in ("infer", "read", "admin", "open")
        for methods, path in re.findall(r"`((?:GET|POST|PUT|DELETE)(?:, (?:GET|POST|PUT|DELETE))*) (/[^`]*)`", calls)
        for method in methods.split(", ")
    }
    expected = {call: key_scope_of(*call) for call in operations()}
    assert {call: scope for call, scope in listed.items() if call in expected} == expected
    assert all(key_scope_of(*call) == scope for call, scope in listed.items())


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, None),
        ({"Authorization": "Bearer abc"}, "abc"),
        ({"Authorization": "bearer  abc "}, "abc"),
        ({"Authorization": "Basic abc"}, None),
        ({"Authorization": "Bearer"}, None),
        ({"X-API-Key": "abc"}, "abc"),
        ({"X-API-Key": ""}, None),
        ({"Authorization": "Basic x", "X-API-Key": "abc"}, "abc"),
        ({"Authorization": "Bearer abc", "X-API-Key": "other"}, "abc"),
    ],
)
def test_a_token_is_read_from_either_header(headers: dict[str, str], token: str | None) -> None:
    assert token_of(Headers(headers)) == token


@pytest.mark.parametrize("text", ["", "5", "minute", "0/minute", "-1/second", "5/fortnight", "a/b"])
def test_an_invalid_rate_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="no rate"):
        rate(text)


def test_rates_are_an_amount_per_period() -> None:
    assert (rate("600/minute").amount, rate("10 per 5 second").get_expiry()) == (600, 5)
