"""Redis is killed, hangs or loses its data while a server works: no erasure is dropped, no request unanswered."""

import re
import shlex
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.cli import run
from app.live import store_threads
from app.live.store_threads import MAX_THREADS
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure, LiveState
from range_store.storage.store import RangeStore
from tests.e2e.faults.processes import TEXTS, Load, RedisProcess, Served
from tests.processes import Running
from tests.range_store.waiting import until
from tests.servers import RunningServer as InProcess
from tests.servers import with_ranges
from workers.fitting.fit import FitResult

PROBLEM = 'neuronlens_live_state_problem{problem="%s"}'


def assert_unavailable(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), answer.text
    assert int(answer.headers["Retry-After"]) >= 1


def check_while_redis_is_away(served: Served) -> None:
    """It stays ready and tells the age of its state; calls that need the store are refused, the others answered."""
    until(lambda: not served.ready()["checks"]["store"])
    age = served.ready()["snapshot_age"]
    until(lambda: served.ready()["snapshot_age"] > age + 0.5)
    told = served.metric("neuronlens_snapshot_age_seconds")
    assert served.ready()["snapshot_age"] >= told > age + 0.5
    assert "cannot be reached" in served.ready()["problem"]
    assert "127.0.0.1" not in served.ready()["problem"], "readiness needs no API key, and must not tell addresses"
    assert (served.metric("neuronlens_store_up"), served.metric(PROBLEM % "store_down")) == (0, 1)
    generation = served.ready()["generation"]
    several = f'"{generation}", "00000000-1"'
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("PUT", "/v1/erasures/World", {}),
        ("PUT", "/v1/erasures/World", {"headers": {"If-Match": f'"{generation}"'}}),
        ("PUT", "/v1/erasures/World", {"headers": {"If-Match": several}}),
        ("PUT", "/v1/erasures", {"json": {"erasures": []}}),
        ("DELETE", "/v1/erasures/Sports", {}),
        ("PUT", "/v1/range-sets/active", {"json": {"id": "any"}}),
        *(("GET", path, {}) for path in ("/v1/range-sets", "/v1/range-sets/any", "/v1/neurons/2/5")),
    ]
    with ThreadPoolExecutor(len(refused)) as pool:
        for answer in pool.map(lambda call: served.http.request(call[0], call[1], **call[2]), refused):
            assert_unavailable(answer)
    for path in ("/livez", "/v1/erasures", "/v1/concepts", "/v1/concepts/Sports/ranges", "/v1/overlap", "/v1/models"):
        assert served.http.get(path).status_code == 200
    assert [each["concept"] for each in served.http.get("/v1/erasures").json()["erasures"]] == ["Sports"]


def check_after_its_return(served: Served, store: RangeStore) -> None:
    """Toggles work again, and the server follows changes in Redis."""
    assert served.http.put("/v1/erasures/World").status_code == 200
    state = store.set_erasure(LiveErasure(erasure=Erasure(concept="Business")))
    until(lambda: served.ready()["generation"] == state.generation)
    assert served.metric("neuronlens_store_up") == 1
    erased = served.http.post("/v1/classify", json={"inputs": TEXTS}).json()["erasure"]["concepts"]
    assert erased == ["Business", "Sports", "World"]


@pytest.mark.parametrize(
    ("away", "back"),
    [
        pytest.param(RedisProcess.kill, RedisProcess.start, id="killed"),
        pytest.param(lambda it: it.signal(signal.SIGSTOP), lambda it: it.signal(signal.SIGCONT), id="hanging"),
    ],
)
def test_server_answers_without_redis_and_follows_it_after_its_return(
    served: Served,
    store: RangeStore,
    redis_process: RedisProcess,
    away: Callable[[RedisProcess], None],
    back: Callable[[RedisProcess], None],
) -> None:
    """Every request is answered under the last live state, at all times."""
    with Load(served.url) as load:
        for _ in range(2):
            load.more()
            away(redis_process)
            try:
                check_while_redis_is_away(served)
                load.more()
            finally:
                back(redis_process)
            until(served.converged)
        load.more()
        assert load.bad() == []
        assert load.erased() == {("Sports",)}
        check_after_its_return(served, store)
    assert load.bad() == []
    assert "Traceback" not in "".join(served.command.stderr)


def test_hanging_toggles_delay_no_other_request(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the store have threads of their own; a call that gets none of them is refused."""
    others = 50
    """More than the threads that all other routes share."""
    store, change, release = server.service.store, server.service.store.set_erasure, threading.Event()
    hanging: list[object] = []

    def hang(*arguments: Any) -> LiveState:
        hanging.append(arguments)
        assert release.wait(300)
        return change(*arguments)

    monkeypatch.setattr(store, "set_erasure", hang)
    monkeypatch.setattr(store_threads, "PATIENCE", 60.0)
    limits = httpx.Limits(max_connections=MAX_THREADS + others)
    with (
        httpx.Client(base_url=server.url, timeout=300, limits=limits, trust_env=False) as client,
        ThreadPoolExecutor(MAX_THREADS + others) as pool,
    ):
        toggles = [pool.submit(client.put, "/v1/erasures/World") for _ in range(MAX_THREADS)]
        try:
            until(lambda: len(hanging) == MAX_THREADS)
            monkeypatch.setattr(store_threads, "PATIENCE", 0.1)
            toggles += [pool.submit(client.put, "/v1/erasures/World") for _ in range(others)]
            until(lambda: sum(each.done() for each in toggles) == others)
            for path in ("/livez", "/readyz", "/metrics", "/v1/erasures", "/v1/concepts", "/v1/overlap"):
                assert server.http.get(path).status_code == 200
            assert server.classify(TEXTS).status_code == 200
            for each in toggles:
                if each.done():
                    assert_unavailable(each.result())
            assert sum(each.done() for each in toggles) == others, "the toggles still hang"
        finally:
            release.set()
        codes = [each.result().status_code for each in toggles]
    assert (codes.count(200), codes.count(503)) == (MAX_THREADS, others)


def test_advice_in_the_log_restores_everything_after_redis_lost_its_data(
    served: Served, store: RangeStore, redis_process: RedisProcess, tmp_path: Path
) -> None:
    held = store.set_erasure(LiveErasure(erasure=Erasure(concept="World"), enforced=True, reason="a complaint"))
    until(lambda: served.ready()["generation"] == held.generation)
    file = tmp_path / "ranges.safetensors"
    place = ["--redis-url", redis_process.url]
    assert Running(["ranges", "export", str(held.range_set), file, *place, "--name", served.name]).end() == 0
    said = len(served.command.stderr)
    with Load(served.url) as load:
        load.more()
        redis_process.kill()
        redis_process.forget()
        redis_process.start()
        until(lambda: served.ready()["problem"] and served.ready()["checks"]["store"])
        assert "has lost the live state" in served.ready()["problem"]
        assert served.metric(PROBLEM % "lost") == 1
        until(lambda: any("neuronlens ranges import" in line for line in served.command.stderr[said:]))
        line = next(line for line in served.command.stderr[said:] if "neuronlens ranges import" in line)
        advice = re.search(r"`neuronlens (ranges import [^`]+)`", line)
        assert advice is not None
        assert str(held.range_set) in line
        assert held.generation in line, "the log says which state stays in force"
        load.more()
        words = [str(file) if word == "FILE" else word for word in shlex.split(advice[1])]
        assert Running([*words, *place]).end() == 0
        until(served.converged)
        load.more()
    assert load.bad() == []
    assert load.erased() == {("World", "Sports")}, "what is enforced stands first"
    state = store.live_state()
    assert (state.erasures, state.range_set) == (held.erasures, held.range_set)
    assert [each.action for each in store.audit()].count("restore") == 1
    after = [each["concept"] for each in served.http.get("/v1/erasures").json()["erasures"]]
    assert after == ["Sports", "World"]
    assert served.metric(PROBLEM % "lost") == 0


def test_server_is_not_ready_while_its_snapshot_is_older_than_allowed(
    start_server: Callable[..., InProcess],
    fitted: FitResult,
    start_redis: Callable[..., RedisProcess],
    problem: Callable[[httpx.Response, int, str], dict[str, Any]],
) -> None:
    own = start_redis()
    running = with_ranges(start_server(redis_url=own.url, max_snapshot_age=1.5, poll_seconds=0.2), fitted)
    until(lambda: running.http.get("/readyz").json()["checks"]["snapshot_fresh"])
    own.kill()
    until(lambda: running.http.get("/readyz").status_code == 503)
    body = problem(running.http.get("/readyz"), 503, "not_ready")
    assert {name for name, good in body["checks"].items() if not good} == {"snapshot_fresh"}
    assert "the store cannot be reached" in body["detail"]
    assert running.classify(TEXTS).status_code == 200, "requests are answered all the same"
    own.start()
    until(lambda: running.http.get("/readyz").status_code == 200)


@pytest.mark.parametrize("age", ["0.5", "2"])
def test_max_snapshot_age_below_the_poll_interval_is_rejected(age: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--model", "any", "--max-snapshot-age", age]) == 2
    assert "must be more than NEURONLENS_POLL_SECONDS" in capsys.readouterr().err
