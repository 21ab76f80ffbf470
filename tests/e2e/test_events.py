"""`GET /v1/events` over real HTTP: who listens sees what changes, soon, and no longer than it may."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from range_store.api_keys import KeyStore
from tests.e2e.faults.processes import RedisProcess
from tests.e2e.listening import Listener
from tests.e2e.test_metrics import series
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.fitting.corpus import load_corpus
from workers.fitting.fit import Fitted, fit
from workers.models.loading import LoadedModel

Listen = Callable[..., Listener]
Keyed = tuple[RunningServer, dict[str, str], KeyStore]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """`listen(running, token)`: a stream, closed after the test, before its server is stopped."""
    with ExitStack() as stack:

        def start(running: RunningServer, token: str | None = None, **headers: str) -> Listener:
            sent = headers | ({"X-API-Key": token} if token else {})
            return stack.enter_context(Listener(running.url, sent))

        yield start


def test_two_windows_and_another_server_follow_what_a_third_party_changes(
    start_server: Callable[..., RunningServer], fitted: Fitted, listen: Listen
) -> None:
    running = with_ranges(start_server(), fitted)
    other = start_server(name=running.service.name, poll_seconds=3600)  # so it is the message that it follows
    windows = [listen(running), listen(running), listen(other)]
    for window in windows:
        assert window.last() == running.http.get("/v1/erasures").json(), "it begins with what is true"
        assert window.of("live")[0].id == window.last()["generation"]
    body = {"tau": 1.5, "reason": "they asked"}
    changed = running.http.put("/v1/erasures/Sci%2FTech", json=body).json()
    until(lambda: all(window.last() == changed for window in windows))
    assert windows[2].last()["erasures"][0]["reason"] == "they asked"
    running.http.delete("/v1/erasures/Sci%2FTech").raise_for_status()
    until(lambda: all(window.erased() == [] for window in windows))


def test_a_stream_is_what_browsers_and_proxies_expect(server: RunningServer, listen: Listen) -> None:
    window = listen(server, **{"Last-Event-ID": "nothing-that-ever-was\u00e9", "Accept": "text/event-stream"})
    headers = window.reply.headers
    assert window.reply.status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
    assert headers["X-Request-ID"]
    assert "Content-Length" not in headers
    assert window.last()["model"] == server.service.name


def test_silence_is_broken_by_comments(server: RunningServer, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.routes.events.HEARTBEAT", 0.3)
    window = listen(server)
    until(lambda: len(window.comments) >= 2)
    assert len(window.of("live")) == 1


def test_a_published_an_activated_and_a_removed_range_set_are_told(
    server: RunningServer, model: LoadedModel, fitted: Fitted, listen: Listen, tmp_path: Path
) -> None:
    window = listen(server)
    until(lambda: len(window.of("range_sets")) == 1)
    rows = [f'{{"text": "a match in {place}", "label": "Sports"}}\n' for place in ("Oslo", "Lima", "Kyiv")]
    (tmp_path / "few.jsonl").write_text("".join(rows), "utf-8")
    other = fit(model, load_corpus(str(tmp_path / "few.jsonl")), layers=(-1,), bins=8)
    store = server.service.store
    id_ = store.publish(other.range_set, other.inspect)
    until(lambda: len(window.of("range_sets")) == 2)
    assert window.of("range_sets")[-1].data == {}
    server.http.put("/v1/range-sets/active", json={"id": id_}).raise_for_status()
    until(lambda: window.last()["range_set"] == id_ and len(window.of("range_sets")) == 3)
    store.remove(fitted.range_set.id)
    until(lambda: len(window.of("range_sets")) == 4)


def test_the_newest_state_of_a_job_is_told_to_all_and_to_who_comes_later(server: RunningServer, listen: Listen) -> None:
    window = listen(server)
    until(lambda: window.of("live"))
    server.service.news.tell_job("fit-1", {"id": "fit-1", "state": "running", "corpus": "Météo\n"})
    until(lambda: window.of("jobs"))
    assert window.of("jobs")[0].data == {"id": "fit-1", "state": "running", "corpus": "Météo\n"}
    server.service.news.tell_job("fit-1", {"id": "fit-1", "state": "done"})
    until(lambda: len(window.of("jobs")) == 2)
    server.service.news.tell_job("fit-1", {"id": "fit-1", "state": "queued"})  # an older word, that comes late
    later = listen(server)
    until(lambda: later.of("jobs"))
    assert [each.data["state"] for each in later.of("jobs")] == ["done"]


def test_what_expires_is_told_even_while_the_store_is_away(
    start_server: Callable[..., RunningServer], fitted: Fitted, listen: Listen, tmp_path: Path
) -> None:
    store = RedisProcess(tmp_path / "redis")
    try:
        running = with_ranges(start_server(redis_url=store.url), fitted)
        window = listen(running)

        def told(concept: str) -> bool:
            return any(each["concept"] == concept for event in window.of("live") for each in event.data["erasures"])

        running.http.put("/v1/erasures/World", json={"expires_in": 3}).raise_for_status()
        until(lambda: told("World"))
        until(lambda: window.erased() == [])
        running.http.put("/v1/erasures/Sports", json={"expires_in": 5}).raise_for_status()
        store.kill()
        until(lambda: told("Sports"))
        until(lambda: window.erased() == [])
        until(lambda: not running.service.mirror.store_up)
    finally:
        store.kill()


def test_a_storm_of_changes_ends_in_the_newest_state_and_is_not_told_one_by_one(
    server: RunningServer, listen: Listen
) -> None:
    window = listen(server)
    until(lambda: window.of("live"))
    for number in range(60):
        server.http.put("/v1/erasures/Sports", json={"tau": 1 + number / 100}).raise_for_status()
    now = server.http.get("/v1/erasures").json()
    until(lambda: window.last() == now)
    counters = [int(each.data["generation"].split("-")[1]) for each in window.of("live")]
    assert counters == sorted(set(counters))


@pytest.mark.parametrize("end", ["revoked", "expired"])
def test_a_key_that_ends_takes_its_stream_with_it(server_with_keys: Keyed, listen: Listen, end: str) -> None:
    running, tokens, keys = server_with_keys
    expires_at = time.time() + 8 if end == "expired" else None
    _, token = keys.create("short", ["read"], expires_at=expires_at)
    running.service.keyring.refresh()
    window, other = listen(running, token), listen(running, tokens["read"])
    until(lambda: window.of("live") and other.of("live"))
    assert window.ended is None
    if end == "revoked":
        keys.revoke("short")
    until(lambda: window.ended)
    assert window.ended == "whole"
    running.http.put("/v1/erasures/Sports", json={}, headers={"X-API-Key": tokens["admin"]}).raise_for_status()
    until(lambda: other.erased() == ["Sports"])
    assert window.erased() == []


def test_who_listens_without_a_key_is_cut_off_when_keys_come_into_force(
    own_redis: Any, start_server: Callable[..., RunningServer], fitted: Fitted, listen: Listen
) -> None:
    running = with_ranges(start_server(redis_url=own_redis.url), fitted)
    window = listen(running)
    until(lambda: window.of("live"))
    KeyStore(own_redis).create("first", ["read"])
    until(lambda: window.ended == "whole")


def test_streams_are_bounded_and_counted_apart_from_requests(
    start_server: Callable[..., RunningServer], fitted: Fitted, listen: Listen, problem: Callable[..., dict[str, Any]]
) -> None:
    running = with_ranges(start_server(max_event_streams=2), fitted)
    windows = [listen(running), listen(running)]
    refused = running.http.get("/v1/events")
    problem(refused, 429, "too_many_streams")
    assert int(refused.headers["Retry-After"]) >= 1
    assert series(running, "neuronlens_event_streams") == {(): 2.0}
    assert series(running, "neuronlens_http_requests_in_flight") == {(): 1.0}, "this one"
    assert series(running, "neuronlens_http_requests_total")["GET", "/v1/events", "200"] == 2.0
    windows[0].close()
    until(lambda: series(running, "neuronlens_event_streams") == {(): 1.0})
    until(lambda: listen(running).reply.status == 200)


def test_one_key_takes_no_more_than_half_of_the_streams(
    own_redis: Any,
    start_server: Callable[..., RunningServer],
    fitted: Fitted,
    listen: Listen,
    problem: Callable[..., dict[str, Any]],
) -> None:
    keys = KeyStore(own_redis)
    one, other = (keys.create(name, ["read"])[1] for name in ("one", "other"))
    running = with_ranges(start_server(redis_url=own_redis.url, max_event_streams=4), fitted)
    windows = [listen(running, one), listen(running, one)]
    problem(running.http.get("/v1/events", headers={"X-API-Key": one}), 429, "too_many_streams")
    assert [listen(running, other).reply.status for _ in range(2)] == [200, 200]
    problem(running.http.get("/v1/events", headers={"X-API-Key": other}), 429, "too_many_streams")
    windows[0].close()
    until(lambda: listen(running, one).reply.status == 200)


def test_a_server_that_drains_ends_its_streams_and_opens_none(
    server: RunningServer, listen: Listen, problem: Callable[..., dict[str, Any]]
) -> None:
    window = listen(server)
    until(lambda: window.of("live"))
    server.service.engine.drain()
    until(lambda: window.ended == "whole")
    problem(server.http.get("/v1/events"), 503, "draining")


def test_wrong_queries_are_refused_before_anything_streams(server: RunningServer, problem: Callable[..., Any]) -> None:
    problem(server.http.get("/v1/events?once=true"), 422, "invalid")
    problem(server.http.get("/v1/events?model=other"), 404, "unknown_model")
    with httpx.stream("GET", f"{server.url}/v1/events", params={"model": server.service.name}) as answer:
        assert answer.status_code == 200
