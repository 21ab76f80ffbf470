"""Every reply matches the committed `openapi.json`: status, headers, media type and body.

Schemathesis derives valid and invalid requests from the document; Hypothesis sends bytes that it does not describe.
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
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.jobs.runner import FitRunner
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.api_keys import ApiKeyStore
from tests.app.openapi import key_scope_of
from tests.e2e.reports import write_report
from tests.servers import RunningServer, with_ranges
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.fit import FitResult

DOCUMENT = Path(__file__).parents[2] / "openapi.json"
# without use_after_free: a cancelled job can still be read
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
# most requests name things that exist: otherwise most replies would be 404
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
[[operations]]  # the stream does not end; test_events.py tests it
include-path = "/v1/events"
enabled = false
[[operations]]  # a request may set a tiny timeout, or another generation
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
[[operations]]  # the queue of fits may be full
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
"path.id" = {{ dictionary = "models", probability = 0.9 }}
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


# unsupported options and other model names in the path are valid by the document
DROPIN = """
[[operations]]
include-path = "{path}"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 503, 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 400, 401, 403, 404, 413, 422, 503, 504] }}
"""
# so is a tiny `wait_seconds`
WAITED = """
[[operations]]
include-path = "{path}"
[operations.checks]
not_a_server_error = {{ expected-statuses = ["2XX", "4XX", 504] }}
positive_data_acceptance = {{ expected-statuses = [200, 401, 403, 404, 409, 412, 422, 504] }}
"""
WAITING_PATHS = ("/v1/erasures", "/v1/erasures/{concept}", "/v1/range-sets/active")
CONSOLE = (("UnsupportedMethodResponse", ["GET /"]), ("AllowHeaderMismatch", ["OPTIONS /"]))
"""Expected: `POST /` is in the document, and `GET /`, the console, is not."""
DROPIN_PATHS = (
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


FULL = pytest.mark.full
ServerWithKeys = tuple[RunningServer, dict[str, str], ApiKeyStore]


@pytest.fixture
def start_server(
    start_server: Callable[..., RunningServer], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., RunningServer]:
    """Start servers that accept fits; news/long.jsonl takes long only in the full tier."""
    texts = tmp_path / "texts"
    (texts / "news").mkdir(parents=True)
    write_jsonl(texts / "news/train.jsonl", labelled_texts(30, seed=3))
    long = request.node.get_closest_marker("full") is not None
    write_jsonl(texts / "news/long.jsonl", labelled_texts(5000, seed=4) * 12 if long else labelled_texts(30, seed=4))
    return functools.partial(start_server, fit_dirs=[texts], fit_threads=1, fit_niceness=0)


@pytest.fixture
def fits_stay_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits are accepted and can be cancelled, but never start: they would take the processor from the requests."""
    monkeypatch.setattr(FitRunner, "_start", lambda *_: None)


def explore(
    running: RunningServer, folder: Path, document: Path, *options: str, token: str | None = None, auth: bool = False
) -> tuple[dict[str, Any], str]:
    """Run Schemathesis on every operation of a document; gives its report and its output.

    Args:
        token: the key that most requests send.
        auth: whether keys are in force; requests without a valid key must then be rejected.
    """
    write_report(running.service.settings.reports, "the-last")
    config, report = folder / "schemathesis.toml", folder / "report.json"
    store = running.service.store
    store.client.hset(store.keys.replicas, "since", "0")  # the list of replicas counts as complete
    live = store.live_state()
    # different keys make two jobs of the same request; the second one is still queued when it is cancelled
    request = {"data": "news/long.jsonl"}
    first, job = (running.service.jobs.add(request, "test", key, "fingerprint", max_pending=1000).id for key in "ab")
    assert first != job
    settings_of_schemathesis = CONFIG.format(
        job=job,
        waited="".join(WAITED.format(path=path) for path in WAITING_PATHS),
        range_set=live.range_set,
        epoch=live.epoch,
        model=running.service.name,
        auth=str(auth).lower(),
        dropin="".join(DROPIN.format(path=path) for path in DROPIN_PATHS),
    )
    config.write_text(settings_of_schemathesis + (AUTH.format(token=token) if token else ""), "utf-8")
    checks = CHECKS if auth else tuple(check for check in CHECKS if check != "ignored_auth")
    command = [Path(sys.executable).parent / "schemathesis", "--config-file", config, "run", document, "--no-color"]
    command += ["--url", running.url, "--checks", ",".join(checks), *options]
    command += ["--report", "json", "--report-json-path", report]
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # the same requests every time
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, env=environment)
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text("utf-8")), done.stdout


def check_replies(running: RunningServer, folder: Path, *options: str, **caller: Any) -> set[str]:
    """Explore the whole document and fail on a wrong reply; gives the calls that accepted a request."""
    found, output = explore(running, folder, DOCUMENT, *options, **caller)
    assert not [each for each in found["failures"] if (each["type"], each["operations"]) not in CONSOLE], output
    assert not found["errors"], output
    assert found["complete"], output
    assert found["operations"]["tested"] == len(calls())
    return {call for call, phases in found["valid_rates"].items() if sum(each["accepted"] for each in phases.values())}


@pytest.mark.usefixtures("fits_stay_queued")
def test_every_call_accepts_valid_requests_and_replies_as_documented(
    fresh_server: RunningServer, tmp_path: Path
) -> None:
    few_valid = ("--phases", "fuzzing", "--mode", "positive", "--max-examples", "8", "--seed", "5")
    assert check_replies(fresh_server, tmp_path, *few_valid) == set(calls())


@pytest.mark.usefixtures("fits_stay_queued")
def test_replies_to_invalid_requests_and_keys_are_as_documented(
    server_with_keys: ServerWithKeys, tmp_path: Path
) -> None:
    running, tokens, _ = server_with_keys
    few = ("--phases", "fuzzing", "--max-examples", "3", "--seed", "5")
    check_replies(running, tmp_path, *few, token=tokens["admin"], auth=True)


@FULL
@pytest.mark.usefixtures("fits_stay_queued")
def test_replies_to_many_requests_are_as_documented(
    fresh_server: RunningServer, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    many = ("--max-examples", "200", "--seed", str(pytestconfig.getoption("--seed")))
    assert check_replies(fresh_server, tmp_path, *many) == set(calls())


@FULL
@pytest.mark.usefixtures("fits_stay_queued")
@pytest.mark.parametrize(("scope", "examples"), [("admin", 200), ("infer", 50), ("read", 50), (None, 50)])
def test_replies_to_many_requests_with_a_key_are_as_documented(
    server_with_keys: ServerWithKeys, tmp_path: Path, pytestconfig: pytest.Config, scope: str | None, examples: int
) -> None:
    """A key opens the calls of its scope and no others."""
    running, tokens, _ = server_with_keys
    many = ("--max-examples", str(examples), "--seed", str(pytestconfig.getoption("--seed")))
    expected = set(calls())
    if scope != "admin":
        # only admins may then compare, or read activations
        running.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="World"), enforced=True))
        running.service.mirror.refresh()
        expected = {call for call, needed in calls().items() if needed in (None, scope)} - {"POST /v1/activations"}
    token = tokens[scope] if scope else None
    assert check_replies(running, tmp_path, *many, token=token, auth=token is not None) == expected


def calls() -> dict[str, str | None]:
    """The scope that each call of the document needs, without the event stream, which does not end."""
    paths = json.loads(DOCUMENT.read_text("utf-8"))["paths"]
    named = ((method.upper(), path) for path, methods in paths.items() for method in methods)
    return {f"{method} {path}": key_scope_of(method, path) for method, path in named if path != "/v1/events"}


@pytest.mark.usefixtures("fits_stay_queued")
def test_undocumented_replies_are_detected(fresh_server: RunningServer, tmp_path: Path) -> None:
    document = json.loads(DOCUMENT.read_text("utf-8"))
    document["paths"] = {path: document["paths"][path] for path in ("/v1/overlap", "/v1/models")}
    del document["paths"]["/v1/overlap"]["get"]["responses"]["422"]
    model = document["components"]["schemas"]["ModelOut"]["properties"]
    model["layers"] = {"type": "string"}
    (tmp_path / "changed.json").write_text(json.dumps(document), "utf-8")
    found, _ = explore(fresh_server, tmp_path, tmp_path / "changed.json", "--phases", "coverage", "--seed", "5")
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


DamagedRequest = tuple[str, str, str, bytes, list[tuple[bytes, bytes]]]
"""Method, path, path in the document, body, headers."""


@st.composite
def damaged_requests(draw: st.DrawFn) -> DamagedRequest:
    """A valid request with a part of its body replaced, and with unusual headers."""
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


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=FULL)])
def test_damaged_requests_get_documented_replies(server: RunningServer, operations: Any, examples: int) -> None:
    @settings(max_examples=examples, derandomize=True)
    @given(request=damaged_requests())
    @example(request=("POST", "/v1/classify", "/v1/classify", b"9" * 5000, [(b"Content-Type", b"application/json")]))
    def check(request: DamagedRequest) -> None:
        method, path, documented, body, headers = request
        reply = server.http.request(method, path, content=body, headers=headers)
        assert reply.status_code != 500, reply.text
        plain = httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)
        # Schemathesis cannot read the unusual headers of the request
        plain.request, plain.elapsed = httpx.Request(method, reply.request.url), reply.elapsed
        operations[documented][method].validate_response(plain)

    check()


def test_unsupported_method_is_rejected_with_405(server: RunningServer, problem: Any) -> None:
    for method in ("TRACE", "OPTIONS", "PATCH", "PROPFIND"):
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
def malformed_http(draw: st.DrawFn) -> bytes:
    """A request with unusual lines in its head, and with some bytes replaced."""
    head, _, body = REQUEST.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    for line in draw(st.lists(st.sampled_from(LINES), max_size=2)):
        lines.insert(draw(st.integers(1, len(lines))), line)
    raw = b"\r\n".join(lines) + b"\r\n\r\n" + body
    if draw(st.booleans()):
        start = draw(st.integers(0, len(raw)))
        raw = raw[:start] + draw(st.binary(max_size=6)) + raw[start + draw(st.integers(0, 8)) :]
    return raw


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=FULL)])
def test_malformed_http_gets_a_client_error_or_a_closed_connection(
    start_server: Callable[..., RunningServer], fitted: FitResult, examples: int
) -> None:
    running = with_ranges(start_server(header_timeout=2.0, body_timeout=0.2), fitted)
    url = httpx.URL(running.url)

    @settings(max_examples=examples, derandomize=True)
    @given(raw=malformed_http())
    @example(raw=REQUEST)
    def check(raw: bytes) -> None:
        reply = b""
        with socket.create_connection((url.host, url.port or 0), timeout=60) as connection, suppress(ConnectionError):
            connection.sendall(raw)
            while received := connection.recv(65536):
                reply += received
                if b"\r\n\r\n" in reply and b"connection: close" not in reply.lower():
                    break  # the server keeps the connection open for another request
        assert re.match(rb"HTTP/1\.1 (100|200|4\d\d) ", reply) or not reply, reply[:500]
        assert reply.startswith(b"HTTP/1.1 200 ") or raw != REQUEST
        assert running.http.get("/livez").status_code == 200

    check()


def test_parser_rejects_an_unknown_method_with_a_problem(server: RunningServer, problem: Any) -> None:
    problem(server.http.request("BREW", "/v1/classify"), 400, "malformed")
    assert server.http.get("/livez").status_code == 200
