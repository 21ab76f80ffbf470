"""`GET /v1/events` over real HTTP: streams show changes, and end when their caller loses access."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from range_store.storage.api_keys import ApiKeyStore
from range_store.storage.clock import StoreClock
from tests.e2e.faults.processes import RedisProcess
from tests.e2e.listening import Listener
from tests.e2e.test_metrics import series
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.corpora.loading import load_corpus
from workers.fitting.fit import FitResult, fit
from workers.models.loading import LoadedModel

Listen = Callable[..., Listener]
ServerWithKeys = tuple[RunningServer, dict[str, str], ApiKeyStore]
HOUR = 3600.0


@pytest.fixture
def listen() -> Iterator[Listen]:
    """`listen(running, token)`: open a stream; it is closed after the test, before its server stops."""
    with ExitStack() as stack:

        def start(running: RunningServer, token: str | None = None, **headers: str) -> Listener:
            sent = headers | ({"X-API-Key": token} if token else {})
            return stack.enter_context(Listener(running.url, sent))

        yield start


@pytest.fixture
def advance_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`advance_clock(seconds)`: move wall and store clock of this process. Streams look ten times a second."""
    monkeypatch.setattr("app.live.event_stream.TICK", 0.1)
    monkeypatch.setattr("app.routes.events.TICK", 0.1)
    real, stored, ahead = time.time, StoreClock.now, 0.0

    def advance(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    monkeypatch.setattr(StoreClock, "now", lambda clock: stored(clock) + ahead)
    return advance


def test_streams_of_every_server_show_a_change(
    start_server: Callable[..., RunningServer], fitted: FitResult, listen: Listen
) -> None:
    running = with_ranges(start_server(), fitted)
    other = start_server(name=running.service.name, poll_seconds=3600)  # it learns of changes by messages only
    windows = [listen(running), listen(running), listen(other)]
    for window in windows:
        assert window.last() == running.http.get("/v1/erasures").json(), "a stream begins with the current state"
        assert window.of("live")[0].id == window.last()["generation"]
    body = {"tau": 1.5, "reason": "on request"}
    changed = running.http.put("/v1/erasures/Sci%2FTech", json=body).json()
    until(lambda: all(window.last() == changed for window in windows))
    assert windows[2].last()["erasures"][0]["reason"] == "on request"
    running.http.delete("/v1/erasures/Sci%2FTech").raise_for_status()
    until(lambda: all(window.erased() == [] for window in windows))


def test_stream_headers_suit_browsers_and_proxies(server: RunningServer, listen: Listen) -> None:
    window = listen(server, **{"Last-Event-ID": "unknown\u00e9", "Accept": "text/event-stream"})
    headers = window.reply.headers
    assert window.reply.status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
    assert headers["X-Request-ID"]
    assert "Content-Length" not in headers
    assert window.last()["model"] == server.service.name


def test_comments_keep_a_quiet_stream_alive(
    server: RunningServer, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routes.events.HEARTBEAT", 0.1)
    monkeypatch.setattr("app.routes.events.TICK", 0.1)
    window = listen(server)
    until(lambda: len(window.comments) >= 2)
    assert len(window.of("live")) == 1


def test_stream_reports_published_activated_and_removed_range_sets(
    fresh_server: RunningServer, model: LoadedModel, fitted: FitResult, listen: Listen, tmp_path: Path
) -> None:
    window = listen(fresh_server)
    until(lambda: len(window.of("range_sets")) == 1)
    rows = [f'{{"text": "a match in {place}", "label": "Sports"}}\n' for place in ("Oslo", "Lima", "Kyiv")]
    (tmp_path / "few.jsonl").write_text("".join(rows), "utf-8")
    other = fit(model, load_corpus(str(tmp_path / "few.jsonl")), layers=(-1,), bins=8)
    store = fresh_server.service.store
    id_ = store.range_sets.publish(other.range_set, other.inspect)
    until(lambda: len(window.of("range_sets")) == 2)
    assert window.of("range_sets")[-1].data == {}
    fresh_server.http.put("/v1/range-sets/active", json={"id": id_}).raise_for_status()
    until(lambda: window.last()["range_set"] == id_ and len(window.of("range_sets")) == 3)
    store.range_sets.remove(fitted.range_set.id)
    until(lambda: len(window.of("range_sets")) == 4)


def test_every_stream_reports_the_newest_state_of_a_job(fresh_server: RunningServer, listen: Listen) -> None:
    window = listen(fresh_server)
    until(lambda: window.of("live"))
    feed = fresh_server.service.feed
    running, done, other = '{"state":"running","corpus":"Météo\\n"}', '{"state":"done"}', '{"state":"queued"}'
    feed.set_jobs({"fit-1": running.encode()})
    until(lambda: window.of("jobs"))
    assert window.of("jobs")[0].data == {"state": "running", "corpus": "Météo\n"}
    feed.set_jobs({"fit-1": done.encode(), "fit-2": other.encode()})
    until(lambda: len(window.of("jobs")) == 3)
    feed.set_jobs({"fit-1": done.encode(), "fit-2": running.encode()})
    until(lambda: len(window.of("jobs")) == 4)
    assert [each.data["state"] for each in window.of("jobs")[1:]] == ["done", "queued", "running"]
    later = listen(fresh_server)
    until(lambda: len(later.of("jobs")) == 2)
    assert [each.data["state"] for each in later.of("jobs")] == ["done", "running"]


def test_stream_reports_an_expiry_even_while_redis_is_down(
    start_server: Callable[..., RunningServer],
    fitted: FitResult,
    listen: Listen,
    tmp_path: Path,
    advance_clock: Callable[[float], None],
) -> None:
    redis_process = RedisProcess(tmp_path / "redis")
    try:
        running = with_ranges(start_server(redis_url=redis_process.url), fitted)
        window = listen(running)
        running.http.put("/v1/erasures/World", json={"expires_in": HOUR}).raise_for_status()
        until(lambda: window.erased() == ["World"])
        advance_clock(HOUR)
        until(lambda: window.erased() == [])
        running.http.put("/v1/erasures/Sports", json={"expires_in": HOUR}).raise_for_status()
        until(lambda: window.erased() == ["Sports"])
        redis_process.kill()
        until(lambda: not running.service.mirror.store_up)
        assert window.erased() == ["Sports"]
        advance_clock(HOUR)
        until(lambda: window.erased() == [])
    finally:
        redis_process.kill()


def test_fast_changes_are_merged_and_end_in_the_newest_state(server: RunningServer, listen: Listen) -> None:
    window = listen(server)
    until(lambda: window.of("live"))
    for number in range(20):
        server.http.put("/v1/erasures/Sports", json={"tau": 1 + number / 100}).raise_for_status()
    newest = server.http.get("/v1/erasures").json()
    until(lambda: window.last() == newest)
    counters = [int(each.data["generation"].split("-")[1]) for each in window.of("live")]
    assert counters == sorted(set(counters))


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_stream_ends_when_its_key_ends(
    server_with_keys: ServerWithKeys, listen: Listen, advance_clock: Callable[[float], None], end: str
) -> None:
    running, tokens, keys = server_with_keys
    _, token = keys.create("short", ["read"], expires_at=time.time() + HOUR)
    running.service.keyring.refresh()
    window, other = listen(running, token), listen(running, tokens["read"])
    until(lambda: window.of("live") and other.of("live"))
    assert window.ended is None
    if end == "revoked":
        keys.revoke("short")
    else:
        advance_clock(HOUR)
    until(lambda: window.ended)
    assert window.ended == "complete"
    running.http.put("/v1/erasures/Sports", json={}, headers={"X-API-Key": tokens["admin"]}).raise_for_status()
    until(lambda: other.erased() == ["Sports"])
    assert window.erased() == []


def test_stream_without_a_key_ends_when_the_first_key_is_created(
    own_redis: Any, start_server: Callable[..., RunningServer], fitted: FitResult, listen: Listen
) -> None:
    running = with_ranges(start_server(redis_url=own_redis.url), fitted)
    window = listen(running)
    until(lambda: window.of("live"))
    ApiKeyStore(own_redis).create("first", ["read"])
    until(lambda: window.ended == "complete")


def test_streams_are_limited_and_counted_separately(
    start_server: Callable[..., RunningServer],
    fitted: FitResult,
    listen: Listen,
    problem: Callable[..., dict[str, Any]],
) -> None:
    running = with_ranges(start_server(max_event_streams=2), fitted)
    windows = [listen(running), listen(running)]
    refused = running.http.get("/v1/events")
    problem(refused, 429, "too_many_streams")
    assert int(refused.headers["Retry-After"]) >= 1
    assert series(running, "neuronlens_event_streams") == {(): 2.0}
    assert series(running, "neuronlens_http_requests_in_flight") == {(): 1.0}, "only the request for the metrics"
    assert series(running, "neuronlens_http_requests_total")["GET", "/v1/events", "200"] == 2.0
    windows[0].close()
    until(lambda: series(running, "neuronlens_event_streams") == {(): 1.0})
    until(lambda: listen(running).reply.status == 200)


def test_one_key_takes_at_most_half_of_the_streams(
    own_redis: Any,
    start_server: Callable[..., RunningServer],
    fitted: FitResult,
    listen: Listen,
    problem: Callable[..., dict[str, Any]],
) -> None:
    keys = ApiKeyStore(own_redis)
    one, other = (keys.create(name, ["read"])[1] for name in ("one", "other"))
    running = with_ranges(start_server(redis_url=own_redis.url, max_event_streams=4), fitted)
    windows = [listen(running, one), listen(running, one)]
    problem(running.http.get("/v1/events", headers={"X-API-Key": one}), 429, "too_many_streams")
    assert [listen(running, other).reply.status for _ in range(2)] == [200, 200]
    problem(running.http.get("/v1/events", headers={"X-API-Key": other}), 429, "too_many_streams")
    windows[0].close()
    until(lambda: listen(running, one).reply.status == 200)


def test_draining_server_ends_its_streams_and_opens_none(
    fresh_server: RunningServer, listen: Listen, problem: Callable[..., dict[str, Any]]
) -> None:
    window = listen(fresh_server)
    until(lambda: window.of("live"))
    fresh_server.service.engine.drain()
    until(lambda: window.ended == "complete")
    problem(fresh_server.http.get("/v1/events"), 503, "draining")


def test_invalid_query_is_rejected_before_a_stream_begins(server: RunningServer, problem: Callable[..., Any]) -> None:
    problem(server.http.get("/v1/events?once=true"), 422, "invalid")
    problem(server.http.get("/v1/events?model=other"), 404, "unknown_model")
    with httpx.stream("GET", f"{server.url}/v1/events", params={"model": server.service.name}) as answer:
        assert answer.status_code == 200
