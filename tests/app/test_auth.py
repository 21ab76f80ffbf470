"""Which call needs which scope; the documentation and the OpenAPI document say the same."""

import re
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from app.auth import scope_of, token_of
from app.main import create_app
from app.rates import rate
from app.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "http.md"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "WHATEVER"])
@pytest.mark.parametrize(
    "path", ["/console", "/v1", "/v1/", "/v2/x", "/metrics/", "/livez/..", "/v1/classify/", "/docsx", ""]
)
def test_what_is_not_known_to_be_open_needs_a_key(method: str, path: str) -> None:
    assert scope_of(method, path) is not None


def test_the_console_is_open_to_look_at_only() -> None:
    for path in ("/", "/console/main.js"):
        scopes = {method: scope_of(method, path) for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")}
        assert {method for method, scope in scopes.items() if scope is None} == {"GET", "HEAD"}


def test_the_openapi_document_names_the_scope_of_every_call() -> None:
    for path, operations in create_app(Settings()).openapi()["paths"].items():
        for method, operation in operations.items():
            scope = scope_of(method.upper(), path)
            expected = None if scope is None else [{"bearer": [scope]}, {"apiKey": [scope]}]
            assert operation.get("security") == expected, (method, path)


def test_changes_need_admin_and_looking_does_not() -> None:
    scopes = {
        (method.upper(), path): scope_of(method.upper(), path)
        for path, operations in create_app(Settings()).openapi()["paths"].items()
        for method in operations
    }
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


def test_the_page_has_the_table_of_calls_and_scopes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    listed = {
        (method, path): scope if scope != "open" else None
        for scope, calls in rows
        if scope in ("infer", "read", "admin", "open")
        for methods, path in re.findall(r"`((?:GET|POST|PUT|DELETE)(?:, (?:GET|POST|PUT|DELETE))*) (/[^`]*)`", calls)
        for method in methods.split(", ")
    }
    document = create_app(Settings()).openapi()["paths"]
    real = {
        (method.upper(), path): scope_of(method.upper(), path)
        for path, operations in document.items()
        for method in operations
    }
    assert {call: scope for call, scope in listed.items() if call in real} == real
    assert all(scope_of(*call) == scope for call, scope in listed.items())


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
def test_a_token_is_found_in_either_header(headers: dict[str, str], token: str | None) -> None:
    assert token_of(Headers(headers)) == token


@pytest.mark.parametrize("text", ["", "5", "minute", "0/minute", "-1/second", "5/fortnight", "a/b"])
def test_a_rate_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no rate"):
        rate(text)


def test_rates() -> None:
    assert (rate("600/minute").amount, rate("10 per 5 second").get_expiry()) == (600, 5)
