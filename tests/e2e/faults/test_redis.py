"""Redis dies, hangs or forgets under a server at work (DESIGN promise 5)."""

import re
import shlex
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from range_store.erasure import Erasure
from range_store.live import LiveErasure
from range_store.store import RangeStore
from tests.e2e.faults.processes import TEXTS, Load, RedisProcess, Served, seconds_until
from tests.processes import Running
from tests.range_store.waiting import until
from tests.servers import RunningServer as InProcess
from tests.servers import with_ranges
from workers.fitting.fit import Fitted

RETURN_SECONDS = 2.0
"""Everything converges so soon after Redis is back."""
TRIES = 6
"""Of these one must; the others may meet a machine that is busy with something else."""
Step = Callable[[RedisProcess], None]
PROBLEM = 'neuronlens_live_state_problem{problem="%s"}'


def unavailable(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable"), answer.text
    assert int(answer.headers["Retry-After"]) >= 1


def while_redis_is_away(served: Served) -> None:
    """What holds then: ready, its age told twice alike, changes and reads of the store refused, the rest answered."""
    until(lambda: not served.ready()["checks"]["store"])
    age = served.ready()["snapshot_age"]
    until(lambda: served.ready()["snapshot_age"] > age + 0.5)
    told = served.metric("neuronlens_snapshot_age_seconds")
    assert served.ready()["snapshot_age"] >= told > age + 0.5
    assert "cannot be reached" in served.ready()["problem"]
    assert "127.0.0.1" not in served.ready()["problem"], "anybody may ask for readiness"
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
            unavailable(answer)
    for path in ("/livez", "/v1/erasures", "/v1/concepts", "/v1/concepts/Sports/ranges", "/v1/overlap", "/v1/models"):
        assert served.http.get(path).status_code == 200
    assert [each["concept"] for each in served.http.get("/v1/erasures").json()["erasures"]] == ["Sports"]


def after_its_return(served: Served, store: RangeStore) -> None:
    """Toggles work again, and what is changed in Redis is followed."""
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
        pytest.param(lambda it: it.signal(signal.SIGSTOP), lambda it: it.signal(signal.SIGCONT), id="hangs"),
    ],
)
def test_redis_goes_under_load_and_comes_back(
    served: Served, store: RangeStore, redis_process: RedisProcess, away: Step, back: Step
) -> None:
    took: list[float] = []
    with Load(served.url) as load:
        while len(took) < 2 or (min(took) >= RETURN_SECONDS and len(took) < TRIES):
            load.more()
            away(redis_process)
            while_redis_is_away(served)
            load.more()
            back(redis_process)
            took.append(seconds_until(served.converged))
        load.more()
        assert load.bad() == []
        assert load.erased() == {("Sports",)}
        after_its_return(served, store)
    assert load.bad() == []
    assert min(took) < RETURN_SECONDS
    assert "Traceback" not in "".join(served.command.stderr)


def test_a_hundred_toggles_that_hang_hold_up_nobody_else(served: Served, redis_process: RedisProcess) -> None:
    """Whatever waits for the store waits on threads of its own, and not for long."""
    limits = httpx.Limits(max_connections=200)
    rounds = 0
    with httpx.Client(base_url=served.url, timeout=60, limits=limits, trust_env=False) as many:

        def toggle(number: int) -> tuple[httpx.Response, float]:
            began = time.monotonic()
            return many.put("/v1/erasures/World"), time.monotonic() - began

        with ThreadPoolExecutor(100) as pool:
            redis_process.signal(signal.SIGSTOP)
            try:
                toggles = [pool.submit(toggle, number) for number in range(100)]
                while not all(each.done() for each in toggles):
                    for path in ("/livez", "/readyz", "/metrics", "/v1/erasures", "/v1/concepts", "/v1/overlap"):
                        assert served.http.get(path).status_code == 200
                    assert served.http.post("/v1/classify", json={"inputs": TEXTS}).status_code == 200
                    rounds += not all(each.done() for each in toggles)
                for each in toggles:
                    answer, seconds = each.result()
                    unavailable(answer)
                    assert seconds < 15, "a socket's patience and the queue's, not a hundred times that"
            finally:
                redis_process.signal(signal.SIGCONT)
    assert rounds >= 1, "a whole round was answered while toggles hung"
    until(served.converged)


def test_redis_comes_back_empty_and_what_the_log_says_brings_everything_back(
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
        assert held.generation in line, "it says what stays in force"
        load.more()
        words = [str(file) if word == "FILE" else word for word in shlex.split(advice[1])]
        assert Running([*words, *place]).end() == 0
        took = seconds_until(served.converged)
        load.more()
    assert load.bad() == []
    assert load.erased() == {("Sports", "World")}
    state = store.live()
    assert (state.erasures, state.range_set) == (held.erasures, held.range_set)
    assert [each.action for each in store.audit()].count("restore") == 1
    after = [each["concept"] for each in served.http.get("/v1/erasures").json()["erasures"]]
    assert after == ["Sports", "World"]
    assert served.metric(PROBLEM % "lost") == 0
    assert took < 10 * RETURN_SECONDS


def test_a_snapshot_that_may_not_be_too_old(
    start_server: Callable[..., InProcess],
    fitted: Fitted,
    redis_of_its_own: Callable[..., RedisProcess],
    problem: Callable[[httpx.Response, int, str], dict[str, Any]],
) -> None:
    own = redis_of_its_own()
    running = with_ranges(start_server(redis_url=own.url, max_snapshot_age=1.5, poll_seconds=0.2), fitted)
    until(lambda: running.http.get("/readyz").json()["checks"]["snapshot_fresh"])
    own.kill()
    until(lambda: running.http.get("/readyz").status_code == 503)
    body = problem(running.http.get("/readyz"), 503, "not_ready")
    assert {name for name, good in body["checks"].items() if not good} == {"snapshot_fresh"}
    assert "the store cannot be reached" in body["detail"]
    assert running.classify(TEXTS).status_code == 200, "who asks nevertheless is answered as before"
    own.start()
    until(lambda: running.http.get("/readyz").status_code == 200)


@pytest.mark.parametrize("age", ["0.5", "2"])
def test_an_age_below_the_time_between_two_reads_is_refused(age: str) -> None:
    command = Running(["serve", "--model", "any", "--max-snapshot-age", age])
    assert command.end() == 2
    (line,) = command.stderr
    assert "must be more than poll_seconds" in line
