"""API keys over real HTTP: authentication, scopes, rate limits, and the names in the audit."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.cli import run
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.clock import StoreClock
from range_store.storage.store import RangeStore
from tests.app.openapi import key_scope_of
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.fitting.fit import FitResult

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
Serve = Callable[..., RunningServer]
ServerWithKeys = tuple[RunningServer, dict[str, str], ApiKeyStore]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_every_documented_call_accepts_only_keys_of_its_scope(
    server_with_keys: ServerWithKeys, problem: Problem
) -> None:
    running, tokens, _ = server_with_keys
    document = running.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        named = {"model": running.service.name, "model_version": "1", "concept": "Sports", "range_set": "x"}
        named["id"] = running.service.name
        url = path.format(**named, layer=-1, neuron=0, report="x", file="run.json", job="x")
        for method in operations:
            needed = key_scope_of(method.upper(), path)
            if needed is None:
                assert running.http.request(method, url).status_code == 200
                continue
            problem(running.http.request(method, url, json={}), 401, "no_key")
            problem(running.http.request(method, url, json={}, headers=bearer("nl_no")), 401, "bad_key")
            for scope, token in tokens.items():
                with running.http.stream(method, url, json={}, headers={"X-API-Key": token}) as answer:
                    if not answer.headers["content-type"].startswith("text/event-stream"):  # which does not end
                        answer.read()
                if scope in (needed, "admin"):
                    assert answer.status_code not in (401, 403), (method, path, scope)
                else:
                    problem(answer, 403, "wrong_scope")
                    assert "insufficient_scope" in answer.headers["www-authenticate"]


def test_error_during_authentication_is_a_problem_reply_without_the_token(
    server_with_keys: ServerWithKeys,
    problem: Problem,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, tokens, _ = server_with_keys

    def fails(token: str | None) -> None:
        raise ValueError(token)

    monkeypatch.setattr(running.service.keyring, "identify", fails)
    problem(running.http.get("/v1/models", headers=bearer(tokens["read"])), 500, "internal")
    assert tokens["read"] not in caplog.text


def test_key_with_an_unreadable_rate_limit_is_rejected_and_logged_once(
    server_with_keys: ServerWithKeys, problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    """Another version of the program may have written it."""
    running, tokens, keys = server_with_keys
    for number, rate in enumerate(("now and then", "", "0/minute", "-1/second", "9" * 5000 + "/day")):
        key, token = keys.create(f"newer-version-{number}", ["read"], rate_limit=rate)
        for _ in range(3):
            running.service.keyring.refresh()
        assert "damaged" in problem(running.http.get("/v1/models", headers=bearer(token)), 401, "bad_key")["detail"]
        assert running.http.get("/v1/models", headers=bearer(tokens["read"])).status_code == 200
        assert caplog.text.count(f"neuronlens keys revoke {key.id}") == 1
        assert token not in caplog.text
        keys.revoke(key.id)
        running.service.keyring.refresh()
        assert "revoked" in problem(running.http.get("/v1/models", headers=bearer(token)), 401, "bad_key")["detail"]


def test_missing_key_is_reported_before_the_body_is_read(server_with_keys: ServerWithKeys, problem: Problem) -> None:
    running, _, _ = server_with_keys
    port = httpx.URL(running.url).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")  # and no body
        assert connection.recv(100).startswith(b"HTTP/1.1 401")
    problem(running.http.post("/v1/classify", content=b"{" * 10), 401, "no_key")
    problem(running.http.get("/v1/nothing-there"), 401, "no_key")


def test_audit_and_erasures_name_the_key(server_with_keys: ServerWithKeys) -> None:
    running, tokens, _ = server_with_keys
    headers = bearer(tokens["admin"])
    state = running.http.put("/v1/erasures/Sports", json={"reason": "a reason"}, headers=headers).json()
    assert [each["by"] for each in state["erasures"]] == ["key:the-admin"]
    running.http.delete("/v1/erasures/Sports", headers=headers)
    running.http.put("/v1/erasures", json={"erasures": [{"concept": "World"}]}, headers=headers)
    running.http.put("/v1/range-sets/active", json={"id": state["range_set"]}, headers=headers)
    store: RangeStore = running.service.store
    changes = [entry for entry in store.audit() if entry.by == "key:the-admin"]
    assert [entry.action for entry in changes] == ["activate", "replace", "remove", "set"]


def test_baseline_of_an_enforced_erasure_requires_admin(server_with_keys: ServerWithKeys, problem: Problem) -> None:
    running, tokens, _ = server_with_keys
    admin, infer = bearer(tokens["admin"]), bearer(tokens["infer"])
    body = {"inputs": "The striker scored twice.", "compare": True, "erase": []}
    assert running.http.post("/v1/classify", json=body, headers=infer).status_code == 200
    running.http.put("/v1/erasures/Sports", json={"enforced": True, "top_fraction": 1.0}, headers=admin)
    refused = running.http.post("/v1/classify", json=body, headers=infer)
    problem(refused, 403, "wrong_scope")
    assert "insufficient_scope" in refused.headers["www-authenticate"]
    assert running.http.post("/v1/classify", json=body, headers=admin).json()["results"][0]["baseline"]
    plain = running.http.post("/v1/classify", json={**body, "compare": False}, headers=infer).json()
    assert plain["erasure"]["concepts"] == ["Sports"]
    assert plain["results"][0]["baseline"] is None


def test_revoked_key_is_rejected_by_a_running_server(server_with_keys: ServerWithKeys) -> None:
    running, tokens, keys = server_with_keys
    headers = bearer(tokens["read"])
    assert running.http.get("/v1/models", headers=headers).status_code == 200
    keys.revoke("the-read")
    until(lambda: running.http.get("/v1/models", headers=headers).status_code == 401)
    for name in ("the-infer", "the-admin"):
        keys.revoke(name)
    until(lambda: running.http.get("/v1/models", headers=bearer(tokens["admin"])).status_code == 401)


def test_first_key_puts_a_running_server_under_authentication(
    own_redis: EmbeddedRedis, start_server: Serve, fitted: FitResult, tmp_path: Any
) -> None:
    running = with_ranges(start_server(redis_url=own_redis.url, data_dir=tmp_path), fitted)
    assert running.classify("a").status_code == 200
    _, token = ApiKeyStore(own_redis).create("app", ["infer"])
    until(lambda: running.classify("a").status_code == 401)
    assert running.http.post("/v1/classify", json={"inputs": "a"}, headers=bearer(token)).status_code == 200
    # with keys in force, DNS rebinding is harmless, and a proxy may use any host name
    assert running.http.get("/livez", headers={"Host": "neuronlens.example"}).status_code == 200


def test_emptied_redis_does_not_disable_authentication(
    own_redis: EmbeddedRedis, start_server: Serve, fitted: FitResult, tmp_path: Any, problem: Problem
) -> None:
    running = with_ranges(start_server(redis_url=own_redis.url, data_dir=tmp_path, name="one"), fitted)
    keys = ApiKeyStore(own_redis)
    _, token = keys.create("app", ["infer"])
    until(lambda: running.classify("a").status_code == 401)
    own_redis.flushall()
    until(lambda: running.service.mirror.problem is not None)
    body = {"inputs": "a"}
    assert running.http.post("/v1/classify", json=body, headers=bearer(token)).status_code == 200
    problem(running.classify("a"), 401, "no_key")
    again = start_server(redis_url=own_redis.url, data_dir=tmp_path, name="two")
    refused = again.http.post("/v1/classify", json=body, headers=bearer(token))
    assert "keys create" in problem(refused, 503, "keys_unavailable")["detail"]
    assert refused.headers["retry-after"] == "1"
    assert again.http.get("/livez").status_code == 200


def test_rate_limit_applies_to_its_key_only(server_with_keys: ServerWithKeys, problem: Problem) -> None:
    running, tokens, keys = server_with_keys
    _, slow = keys.create("slow", ["read"], rate_limit="3/day")
    running.service.keyring.refresh()
    statuses = [running.http.get("/v1/models", headers=bearer(slow)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = running.http.get("/v1/models", headers=bearer(slow))
    assert "3 per 1 day" in problem(refused, 429, "rate_limited")["detail"]
    assert 0 < int(refused.headers["retry-after"]) <= 86400
    assert running.http.get("/v1/models", headers=bearer(tokens["read"])).status_code == 200


def test_rate_limit_without_keys_applies_to_an_address(
    start_server: Serve, fitted: FitResult, problem: Problem
) -> None:
    running = with_ranges(start_server(rate_limit="2/day"), fitted)
    assert [running.classify("a").status_code for _ in range(2)] == [200, 200]
    problem(running.classify("a"), 429, "rate_limited")
    assert running.http.get("/readyz").status_code == 200


def test_rejections_are_counted_without_naming_keys(server_with_keys: ServerWithKeys) -> None:
    running, tokens, _ = server_with_keys
    running.http.get("/v1/models")
    running.http.get("/v1/models", headers=bearer(tokens["infer"]))
    exposed = running.http.get("/metrics").text
    for reason in ("no_key", "wrong_scope"):
        assert f'neuronlens_auth_rejections_total{{reason="{reason}"}} 1.0' in exposed
    assert not any(word in exposed for word in (*tokens.values(), *(f"the-{scope}" for scope in tokens)))


def test_rejected_requests_are_counted_under_their_route(server_with_keys: ServerWithKeys) -> None:
    running, tokens, _ = server_with_keys
    refused = {
        ("POST", "/v1/classify", "/v1/classify", None, 401),
        ("POST", "/", "/", None, 401),
        ("POST", f"/v2/models/{running.service.name}/infer", "/v2/models/{model}/infer", None, 401),
        ("GET", "/v1/jobs/a-private-name", "/v1/jobs/{job}", None, 401),
        ("PUT", "/v1/erasures/a-private-name", "/v1/erasures/{concept}", "read", 403),
        ("DELETE", "/v1/concepts", "/v1/concepts", "read", 403),
        ("GET", "/v1/a-private-name", "unmatched", None, 401),
    }
    for method, path, _, scope, status in refused:
        headers = bearer(tokens[scope]) if scope else {}
        assert running.http.request(method, path, headers=headers).status_code == status
    body = {"inputs": "a" * 2**20 * 9}
    assert running.http.post("/v1/classify", json=body, headers=bearer(tokens["infer"])).status_code == 413
    value = running.value

    def counted(method: str, template: str, status: int) -> bool:
        labels = {"method": method, "route": template}
        return (
            value("neuronlens_http_requests_total", labels | {"status": str(status)}) == 1
            and value("neuronlens_http_request_seconds_count", labels | {"status_class": "4xx"}) is not None
        )

    for method, _, template, _, status in [*refused, ("POST", "", "/v1/classify", None, 413)]:
        until(lambda request=(method, template, status): counted(*request))  # type: ignore[misc]
    assert "a-private-name" not in running.http.get("/metrics").text


def test_only_admin_sees_the_checkpoint_path(server_with_keys: ServerWithKeys) -> None:
    running, tokens, _ = server_with_keys
    paths = {
        scope: running.http.get("/v1/models", headers=bearer(tokens[scope])).json()["models"][0].get("path")
        for scope in ("read", "admin")
    }
    assert paths["read"] is None
    assert paths["admin"]


def test_cross_origin_requests_need_a_configured_origin(start_server: Serve) -> None:
    origin = {"Origin": "https://console.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    closed = start_server()
    assert closed.http.options("/v1/classify", headers=preflight).status_code != 200
    assert "access-control-allow-origin" not in closed.http.get("/livez", headers=origin).headers
    named = start_server(cors_origins=["https://console.example"])
    allowed = named.http.options("/v1/classify", headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == origin["Origin"]
    other = named.http.get("/livez", headers={"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in other.headers


def test_expired_key_is_rejected(server_with_keys: ServerWithKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    running, _, keys = server_with_keys
    expires_at = time.time() + 3600
    _, token = keys.create("brief", ["read"], expires_at=expires_at)
    running.service.keyring.refresh()
    assert running.http.get("/v1/models", headers=bearer(token)).status_code == 200
    monkeypatch.setattr(StoreClock, "now", lambda clock: expires_at)
    assert running.http.get("/v1/models", headers=bearer(token)).status_code == 401


def test_openapi_document_describes_how_to_send_a_key(server: RunningServer) -> None:
    schemes = json.loads(server.http.get("/openapi.json").text)["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}


def test_command_line_reads_its_key_from_the_environment(
    server_with_keys: ServerWithKeys,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    running, tokens, _ = server_with_keys
    monkeypatch.delenv("NEURONLENS_API_KEY", raising=False)
    assert run(["erase", "list", "--url", running.url]) == 1
    assert "set NEURONLENS_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("NEURONLENS_API_KEY", tokens["read"])
    assert run(["erase", "on", "Sports", "--url", running.url]) == 1
    assert "scope admin" in capsys.readouterr().err
    monkeypatch.setenv("NEURONLENS_API_KEY", tokens["admin"])
    assert run(["erase", "on", "Sports", "--url", running.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["erasures"][0]["by"] == "key:the-admin"
