"""Files of the console over HTTP: access, caching, content security policy; and no script parses HTML."""

import gzip
import re
from collections.abc import Callable

import httpx
import pytest

from app.routes.console import FILES, PLOTLY
from range_store.storage.api_keys import ApiKeyStore
from tests.servers import RunningServer

NAMES = sorted(path.name for path in FILES.iterdir())
REPORT_FRAME = "report-frame.html"
"""The only file that parses HTML. Its sandbox gives it an origin of its own, and its policy forbids all requests."""


def policy(response: httpx.Response) -> dict[str, str]:
    """Return the directives of the content security policy of a response."""
    parts = (part.strip().partition(" ") for part in response.headers["content-security-policy"].split(";"))
    return {name: value for name, _, value in parts}


def test_only_the_files_of_the_console_need_no_key(
    server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore], problem: Callable[..., object]
) -> None:
    server, _, _ = server_with_keys
    for path in ("/", *(f"/console/{name}" for name in NAMES)):
        for method in ("GET", "HEAD"):
            answer = server.http.request(method, path)
            assert answer.status_code == 200, path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert bool(answer.content) == (method == "GET")
    problem(server.http.put("/console/main.js"), 401, "no_key")
    for path in ("/console", "/console/", "/console/..%2Fmain.py", "/console/a/b"):
        problem(server.http.get(path), 401, "no_key")
    problem(server.http.get("/console/nothing.js"), 404, "not_found")


def test_content_security_policy_allows_only_own_scripts(server: RunningServer) -> None:
    page = server.http.get("/")
    rules = policy(page)
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["connect-src"] == "'self'"
    assert not re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|javascript:", page.text)
    assert re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert all(link.startswith("/") for link in re.findall(r'(?:src|href|content)="(\w*:?/[^"#]*)"', page.text))
    frame = server.http.get(f"/console/{REPORT_FRAME}")
    rules = policy(frame)
    assert rules["sandbox"] == "allow-scripts"
    assert (rules["default-src"], rules["frame-ancestors"]) == ("'none'", "'self'")
    assert "connect-src" not in rules


def test_files_are_cached_and_compressed(server: RunningServer) -> None:
    for path in ("/", "/console/main.js", f"/console/{PLOTLY}"):
        first = server.http.get(path)
        again = server.http.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"]
    immutable = server.http.get(f"/console/{PLOTLY}", headers={"Accept-Encoding": "gzip"})
    assert "immutable" in immutable.headers["cache-control"]
    assert immutable.headers["content-encoding"] == "gzip"
    assert int(immutable.headers["content-length"]) < len(immutable.content) / 2
    assert server.http.get("/").headers["cache-control"] == "no-cache"
    assert f"/console/{PLOTLY}" in server.http.get("/").text
    plain = server.http.get("/console/main.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == (FILES / "main.js").read_bytes()
    unwanted = server.http.get("/console/main.js", headers={"Accept-Encoding": "gzip;q=0"})
    assert (unwanted.content, unwanted.headers["etag"]) == (plain.content, plain.headers["etag"])
    packed = server.http.get("/console/main.js")
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["etag"] != plain.headers["etag"], "a strong ETag names one sequence of bytes"
    other = server.http.get("/console/main.js", headers={"If-None-Match": plain.headers["etag"]})
    assert other.status_code == 200
    with httpx.stream("GET", f"{server.url}/console/main.js", headers={"Accept-Encoding": "gzip"}) as raw:
        assert gzip.decompress(b"".join(raw.iter_raw())) == plain.content


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".js", ".html"))])
def test_only_the_report_frame_parses_html(name: str) -> None:
    text = (FILES / name).read_text("utf-8")
    parses = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\(|Function\("
        r"|srcdoc|setHTML|parseHTML"
    )
    assert re.findall(parses, text) == (["document.write"] if name == REPORT_FRAME else [])


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_every_module_is_small_and_imports_only_the_console(name: str) -> None:
    text = (FILES / name).read_text("utf-8")
    assert len(text.splitlines()) < 300
    for imported in re.findall(r'from "\./([^"]+)"', text):
        assert imported in NAMES, imported
    assert not re.findall(r"https?://", text)
