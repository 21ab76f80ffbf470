"""Whatever is sent, the reply is one that the committed `openapi.json` documents: status, headers, media type, body.

Schemathesis makes the requests, valid and invalid, from the document; Hypothesis those that no document describes.
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.auth import scope_of
from range_store.api_keys import KeyStore
from range_store.erasure import Erasure
from range_store.live import LiveErasure
from tests.e2e.reports import write_report
from tests.servers import RunningServer, with_ranges
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.fit import Fitted

DOCUMENT = Path(__file__).parents[2] / "openapi.json"
# not use_after_free: a job that was cancelled is still there, and says so
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "unsupported_method",
    "allow_header_conformance",
    "missing_required_header",
    "ignored_auth",
)
# most requests name things that exist, else all that is seen of an operation is its 404
CONFIG = """
request-timeout = 60
continue-on-failure = true
[cache]
enabled = false
[generation]
database = "none"
with-security-parameters = {auth}
[checks.positive_data_acceptance]
expected-statuses = [200, 202, 401, 403, 404, 409, 412, 422]
[[operations]]  # it does not end; `test_events.py` has its replies
include-path = "/v1/events"
enabled = false
[[operations]]  # a request may ask for an answer within no time at all, or under another generation
include-path = "/v1/classify"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 503, 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 401, 403, 404, 422, 503, 504] }}
{dropin}
[[operations]]
include-path = "/v1/tokenize"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 401, 403, 404, 422, 504] }}
[[operations]]
include-path = "/v1/activations"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 401, 403, 404, 422, 504] }}
{waited}
[[operations]]  # the queue of fits is full at some time
include-path = "/v1/fits"
[operations.checks]
positive_data_acceptance = {{ expected-statuses = [202, 401, 403, 404, 409, 422, 429] }}
[dictionaries]
jobs = {{ values = ["{job}"] }}
files = {{ values = ["news/train.jsonl"] }}
data_sets = {{ values = ["ag_news"] }}
concepts = {{ values = ["World", "Sports", "Business", "Sci/Tech", "Météo & co"] }}
range_sets = {{ values = ["{range_set}"] }}
models = {{ values = ["{model}"] }}
blocks = {{ values = [-2, -1] }}
generations = {{ values = ["{epoch}-0"] }}
reports = {{ values = ["the-last"] }}
[parameters]
"query.model" = "{model}"
"query.layer" = {{ dictionary = "blocks", probability = 0.5 }}
"path.model" = "{model}"
"path.model_version" = "1"
"path.concept" = {{ dictionary = "concepts", probability = 0.6 }}
"path.range_set" = {{ dictionary = "range_sets", probability = 0.5 }}
"path.report" = {{ dictionary = "reports", probability = 0.7 }}
"path.job" = {{ dictionary = "jobs", probability = 0.8 }}
"path.layer" = {{ dictionary = "blocks", probability = 0.7 }}
"header.X-NeuronLens-Min-Generation" = {{ dictionary = "generations", probability = 0.9 }}
"query.wait_seconds" = 20
"body.min_generation" = {{ dictionary = "generations", probability = 0.9 }}
"body.model" = {{ dictionary = "models", probability = 0.9 }}
"body.id" = {{ dictionary = "range_sets", probability = 0.5 }}
"body.layer" = {{ dictionary = "blocks", probability = 0.5 }}
"body.data" = {{ dictionary = "files", probability = 0.9 }}
"body.dataset" = {{ dictionary = "data_sets", probability = 0.9 }}
"body.layers[*]" = {{ dictionary = "blocks", probability = 0.9 }}
"body.erase[*]" = {{ dictionary = "concepts", probability = 0.5 }}
"body.erase[*].concept" = {{ dictionary = "concepts", probability = 0.9 }}
"body.erase.concepts[*]" = {{ dictionary = "concepts", probability = 0.9 }}
"body.erasures[*].concept" = {{ dictionary = "concepts", probability = 0.9 }}
"body.erasures[*].layer" = {{ dictionary = "blocks", probability = 0.5 }}
"""


# what is refused as unsupported, or with the model's name in the path, is valid by the document
DROPIN = """
[[operations]]
include-path = "{path}"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 503, 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 400, 401, 403, 404, 413, 422, 503, 504] }}
"""
# so is a change that is waited for for no time at all
WAITED = """
[[operations]]
include-path = "{path}"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 401, 403, 404, 409, 412, 422, 504] }}
"""
WAITEDS = ("/v1/erasures", "/v1/erasures/{concept}", "/v1/range-sets/active")
CONSOLE = (("UnsupportedMethodResponse", ["GET /"]), ("AllowHeaderMismatch", ["OPTIONS /"]))
"""Found because GET / is the console's page, which is no call of the document, beside POST /, which is one."""
DROPINS = (
    "/",
    "/predict",
    "/tokenize",
    "/classify",
    "/v2/models/{model}/infer",
    "/v2/models/{model}/versions/{model_version}/infer",
)


AUTH = """
[auth.openapi]
bearer = {{ bearer = "{token}" }}
"""


@pytest.fixture
def start_server(start_server: Callable[..., RunningServer], tmp_path: Path) -> Callable[..., RunningServer]:
    """Servers that take fits."""
    texts = tmp_path / "texts"
    (texts / "news").mkdir(parents=True)
    write_jsonl(texts / "news/train.jsonl", labelled_texts(30, seed=3))
    write_jsonl(texts / "news/long.jsonl", labelled_texts(5000, seed=4) * 12)
    return functools.partial(start_server, fit_dirs=[texts], fit_threads=1, fit_niceness=0)


Keyed = tuple[RunningServer, dict[str, str], KeyStore]


def explore(
    running: RunningServer, folder: Path, document: Path, *options: str, token: str | None = None, auth: bool = False
) -> tuple[dict[str, Any], str]:
    """Have Schemathesis try every operation of a document: its report, and what it found in words, with curl lines.

    Args:
        token: sent with most requests.
        auth: whether keys are in force, so that a call without one, or with a wrong one, must be refused.
    """
    write_report(running.service.settings.reports, "the-last")
    config, report = folder / "schemathesis.toml", folder / "report.json"
    store = running.service.store
    store.client.hset(store.keys.replicas, "since", "0")  # so that all who live have reported
    live = store.live()
    # by a key each, else they were one job; the second waits, so that it can be cancelled whatever the machine's speed
    first, job = (running.service.jobs.take({"data": "news/long.jsonl"}, "test", key, 1000).id for key in "ab")
    assert first != job
    dropin = "".join(DROPIN.format(path=path) for path in DROPINS)
    waited = "".join(WAITED.format(path=path) for path in WAITEDS)
    about = {
        "waited": waited,
        "range_set": live.range_set,
        "epoch": live.epoch,
        "model": running.service.name,
        "auth": str(auth).lower(),
        "dropin": dropin,
    }
    settled = CONFIG.format(job=job, **about)
    config.write_text(settled + (AUTH.format(token=token) if token else ""), "utf-8")
    checks = CHECKS if auth else tuple(check for check in CHECKS if check != "ignored_auth")
    command = [Path(sys.executable).parent / "schemathesis", "--config-file", config, "run", document, "--no-color"]
    command += ["--url", running.url, "--checks", ",".join(checks), *options]
    command += ["--report", "json", "--report-json-path", report]
    same = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, env=same)
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text("utf-8")), done.stdout


LONG = pytest.mark.full
pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize(("examples", "at_least"), [(60, 1_500), pytest.param(600, 8_000, marks=LONG)])
def test_every_reply_is_as_documented(
    server: RunningServer, tmp_path: Path, pytestconfig: pytest.Config, examples: int, at_least: int
) -> None:
    accepted = check_replies(server, tmp_path, pytestconfig, examples, at_least)
    assert accepted == set(calls()), "of the others only refusals were seen"


@pytest.mark.parametrize(("examples", "at_least"), [(20, 800), pytest.param(600, 8_000, marks=LONG)])
def test_every_reply_to_a_key_is_as_documented(
    server_with_keys: Keyed, tmp_path: Path, pytestconfig: pytest.Config, examples: int, at_least: int
) -> None:
    running, tokens, _ = server_with_keys
    accepted = check_replies(running, tmp_path, pytestconfig, examples, at_least, token=tokens["admin"], auth=True)
    assert accepted == set(calls()), "of the others only refusals were seen"


@pytest.mark.parametrize("scope", ["infer", "read", None])
@pytest.mark.parametrize(("examples", "mode"), [(5, "positive"), pytest.param(300, "all", marks=LONG)])
def test_a_key_opens_what_its_scope_says_and_nothing_else(
    server_with_keys: Keyed, tmp_path: Path, pytestconfig: pytest.Config, examples: int, mode: str, scope: str | None
) -> None:
    running, tokens, _ = server_with_keys
    enforced = LiveErasure(erasure=Erasure(concept="World"), enforced=True)  # then `compare` is for admins
    running.service.store.set_erasure(enforced)
    running.service.mirror.refresh()
    token = tokens[scope] if scope else None
    accepted = check_replies(
        running, tmp_path, pytestconfig, examples, 200, "--mode", mode, token=token, auth=token is not None
    )
    hidden = {"POST /v1/activations"}  # by the enforced erasure
    assert accepted == {call for call, needed in calls().items() if needed in (None, scope)} - hidden


def check_replies(
    running: RunningServer,
    folder: Path,
    pytestconfig: pytest.Config,
    examples: int,
    at_least: int,
    *more: str,
    **caller: Any,
) -> set[str]:
    """Explore, and fail with what Schemathesis says about a wrong reply: the calls that were answered with 200."""
    seed = pytestconfig.getoption("--seed")
    options = ("--seed", str(seed), "--max-examples", str(examples), *more)
    found, said = explore(running, folder, DOCUMENT, *options, **caller)
    assert not [each for each in found["failures"] if (each["type"], each["operations"]) not in CONSOLE], said
    assert not found["errors"], said
    assert found["complete"], said
    assert found["operations"]["tested"] == len(calls())
    assert found["test_cases"]["generated"] >= at_least, said
    return {call for call, phases in found["valid_rates"].items() if sum(each["accepted"] for each in phases.values())}


def calls() -> dict[str, str | None]:
    """The scope that every call of the document needs, but for those whose reply does not end."""
    paths = json.loads(DOCUMENT.read_text("utf-8"))["paths"]
    named = ((method.upper(), path) for path, methods in paths.items() for method in methods)
    return {f"{method} {path}": scope_of(method, path) for method, path in named if path != "/v1/events"}


def test_a_reply_that_is_not_documented_would_be_found(server: RunningServer, tmp_path: Path) -> None:
    poorer = json.loads(DOCUMENT.read_text("utf-8"))
    poorer["paths"] = {path: poorer["paths"][path] for path in ("/v1/overlap", "/v1/models")}
    del poorer["paths"]["/v1/overlap"]["get"]["responses"]["422"]
    model = poorer["components"]["schemas"]["ModelOut"]["properties"]
    model["layers"] = {"type": "string"}
    (tmp_path / "poorer.json").write_text(json.dumps(poorer), "utf-8")
    found, _ = explore(server, tmp_path, tmp_path / "poorer.json", "--phases", "coverage", "--seed", "5")
    assert {each["type"] for each in found["failures"]} == {"UndefinedStatusCode", "JsonSchemaError"}


VALID = (
    ("POST", "/v1/classify", "/v1/classify", b'{"inputs": ["a goal in the last minute"], "erase": ["Sports"]}'),
    ("POST", "/", "/", b'{"inputs": "a goal", "parameters": {"top_k": 2, "erase": ["Sports"]}}'),
    ("POST", "/predict", "/predict", b'{"inputs": [["a goal"], "b"], "truncation_direction": "Left"}'),
    ("POST", "/classify", "/classify", b'{"input": ["a goal"], "truncate_prompt_tokens": -1, "erase": ["Sports"]}'),
    (
        "POST",
        "/v2/models/x/infer",
        "/v2/models/{model}/infer",
        b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a goal"]}], "parameters": {}}',
    ),
    ("PUT", "/v1/erasures", "/v1/erasures", b'{"erasures": [{"concept": "World", "tau": 2}], "reason": "why"}'),
    ("PUT", "/v1/erasures/Sports", "/v1/erasures/{concept}", b'{"layer": [-1], "replacement": {"damp": 0.5}}'),
    ("PUT", "/v1/range-sets/active", "/v1/range-sets/active", b'{"id": "0123456789abcdef0123", "force": true}'),
    ("GET", "/v1/erasures", "/v1/erasures", b""),
    ("GET", "/v1/concepts/%FF%C3/ranges?layer=%FF&%FF=%00", "/v1/concepts/{concept}/ranges", b""),
    ("DELETE", "/v1/erasures/%00%ED%A0%80%0A", "/v1/erasures/{concept}", b"\xff"),
)
HOSTILE = (
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\0", b"\xef\xbb\xbf", b"NaN", b"1e999", b"9" * 5000, b"-1", b"true"),
    *(b"null", b'"', b",", b"}", b'"inputs": 1,', b'"erase": [],', b"[" * 3000, b'{"a":' * 3000),
)
NAMES = (
    *(b"Content-Type", b"Accept", b"Content-Encoding", b"X-Request-ID", b"X-Request-Timeout", b"If-Match", b"Cookie"),
    b"Inference-Header-Content-Length",
    *(b"traceparent", b"Origin", b"Range", b"Authorization", b"X-API-Key", b"X-Forwarded-For", b"X"),
)
VALUES = (
    *(b"", b"0", b"-1", b"nan", b"inf", b"1e-9", b"*", b'W/"a", "b"', b"gzip", b"/", b"00-", b"a" * 500, b"text/plain"),
    *(b"application/json; charset=utf-16", b"application/json;;;", b"application/x+json"),
)
PRINTABLE = st.binary(max_size=20).map(lambda value: bytes(byte for byte in value if byte > 31 and byte != 127).strip())
HEADER = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | PRINTABLE)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str, str, bytes, list[tuple[bytes, bytes]]]:
    """Method, path, path of the document, body with something put in its place somewhere, and odd headers."""
    method, path, documented, body = draw(st.sampled_from(VALID))
    if draw(st.booleans()):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, len(body)))
        body = body[:start] + draw(st.sampled_from(HOSTILE) | st.binary(max_size=8)) + body[end:]
    headers = [(b"Content-Type", b"application/json")] if draw(st.booleans()) else []
    return method, path, documented, body, headers + draw(st.lists(HEADER, max_size=4))


@pytest.fixture(scope="module")
def operations() -> Any:
    return schemathesis.openapi.from_path(DOCUMENT)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=damaged())
@example(request=("POST", "/v1/classify", "/v1/classify", b"9" * 5000, [(b"Content-Type", b"application/json")]))
def test_bytes_that_no_document_describes_get_a_documented_reply(
    server: RunningServer, operations: Any, request: tuple[str, str, str, bytes, list[tuple[bytes, bytes]]]
) -> None:
    method, path, documented, body, headers = request
    reply = server.http.request(method, path, content=body, headers=headers)
    assert reply.status_code != 500, reply.text
    plain = httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)
    plain.request, plain.elapsed = httpx.Request(method, reply.request.url), reply.elapsed  # without the odd headers
    operations[documented][method].validate_response(plain)


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PATCH", "PROPFIND"])
def test_a_method_that_is_none_here_is_refused(server: RunningServer, problem: Any, method: str) -> None:
    for path in ("/v1/classify", "/livez", "/v1/erasures/Sports"):
        refused = server.http.request(method, path)
        problem(refused, 405, "method_not_allowed")
        assert method not in refused.headers["allow"].split(", ")


REQUEST = (
    b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nX-Request-ID: a\r\n"
    b'Content-Length: 15\r\nConnection: close\r\n\r\n{"inputs": "a"}'
)
LINES = (
    *(b"Host: evil", b"Content-Length: -1", b"Content-Length: 16", b"Content-Length: 99999999999999999999", b"x"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Expect: 100-continue", b"Upgrade: websocket"),
    *(b": a", b"a:" + b"b" * 70_000, b"X-Request-ID: \xff", b" folded", b"Connection: upgrade", b"Host:", b"\x00: a"),
)


@st.composite
def no_quite_http(draw: st.DrawFn) -> bytes:
    """A request with other lines in its head, and bytes put in their place anywhere."""
    head, _, body = REQUEST.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    for line in draw(st.lists(st.sampled_from(LINES), max_size=2)):
        lines.insert(draw(st.integers(1, len(lines))), line)
    raw = b"\r\n".join(lines) + b"\r\n\r\n" + body
    if draw(st.booleans()):
        start = draw(st.integers(0, len(raw)))
        raw = raw[:start] + draw(st.binary(max_size=6)) + raw[start + draw(st.integers(0, 8)) :]
    return raw


@pytest.fixture
def hasty(start_server: Callable[..., RunningServer], fitted: Fitted) -> RunningServer:
    """A server that does not wait long for the rest of a request."""
    return with_ranges(start_server(header_timeout=2.0, body_timeout=0.2), fitted)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=no_quite_http())
@example(raw=REQUEST)
def test_bytes_that_are_hardly_http_are_answered_too(hasty: RunningServer, raw: bytes) -> None:
    """With an answer or an error of the client, or by hanging up; never later than the server's limits."""
    url = httpx.URL(hasty.url)
    reply = b""
    with socket.create_connection((url.host, url.port or 0), timeout=30) as connection, suppress(ConnectionError):
        connection.sendall(raw)
        while received := connection.recv(65536):
            reply += received
            if b"\r\n\r\n" in reply and b"connection: close" not in reply.lower():
                break  # the server would take more
    assert re.match(rb"HTTP/1\.1 (100|200|4\d\d) ", reply) or not reply, reply[:500]
    assert reply.startswith(b"HTTP/1.1 200 ") or raw != REQUEST
    assert hasty.http.get("/livez").status_code == 200


def test_what_is_no_http_is_a_problem_too(
    server: RunningServer, problem: Callable[[httpx.Response, int, str], object]
) -> None:
    """The parser answers, before there is a request whose reply a document could describe."""
    problem(server.http.request("BREW", "/v1/classify"), 400, "malformed")
    assert server.http.get("/livez").status_code == 200
