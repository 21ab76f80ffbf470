"""`?wait=all`, `min_generation`, `/v1/replicas` on servers of one process; `faults/test_replicas.py` has real ones."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.metrics import start_metrics_server
from app.service import Service
from range_store import replicas, reporter
from range_store.erasure import Erasure
from range_store.live import LiveErasure, LiveState
from range_store.replicas import SILENT_SECONDS
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.engine import following
from workers.fitting.fit import Fitted

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty"
HEADER = "X-NeuronLens-Min-Generation"
STRANGER = "elsewhere:1:ab"
PATIENTLY = {"wait_seconds": "25"}


def long_since(running: RunningServer) -> RunningServer:
    """As if its replicas had reported for long: who is not among them is no more."""
    store = running.service.store
    until(lambda: store.replicas.read().replicas)
    store.client.hset(store.keys.replicas, "since", str(time.time() - 10 * SILENT_SECONDS))
    return running


def name_of(running: RunningServer) -> str:
    assert running.service.mirror.reporter is not None
    return running.service.mirror.reporter.name


def generation(running: RunningServer) -> str:
    told: str = running.http.get("/v1/erasures").json()["generation"]
    return told


def after(state: str, steps: int) -> str:
    epoch, counter = state.split("-")
    return f"{epoch}-{int(counter) + steps}"


@pytest.fixture
def deaf(start_server: Callable[..., RunningServer], fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server that does not look for itself, and is told nothing by `unannounced`."""
    monkeypatch.setattr(following, "PATIENCE", 25.0)
    return with_ranges(start_server(poll_seconds=300.0), fitted)


def unannounced(running: RunningServer) -> LiveState:
    store = running.service.store
    before = store.live()
    state = before.advanced(before.range_set, (LiveErasure(erasure=Erasure(concept="World")),))
    store.client.set(store.keys.live, state.model_dump_json())
    return state


def test_a_change_that_is_waited_for_is_in_force_on_every_server(
    start_server: Callable[..., RunningServer], fitted: Fitted
) -> None:
    one = long_since(with_ranges(start_server(), fitted))
    other = start_server(name=one.service.name)
    listed = one.http.get("/v1/replicas").json()
    assert {(each["name"], each["this"]) for each in listed["replicas"]} == {
        (name_of(one), True),
        (name_of(other), False),
    }
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("PUT", "/v1/erasures/Sports", {}),
        ("PUT", "/v1/erasures", {"erasures": [{"concept": "World"}]}),
        ("PUT", "/v1/range-sets/active", {"id": fitted.range_set.id}),
        ("DELETE", "/v1/erasures/World", {}),
        ("DELETE", "/v1/erasures/World", {}),  # changes nothing, and waits all the same
    ]
    for method, path, body in calls:
        reply = one.http.request(method, path, json=body or None, params={"wait": "all", **PATIENTLY})
        assert reply.status_code == 200, reply.text
        assert generation(other) == reply.json()["generation"]
        assert other.classify(TEXT).json()["erasure"]["generation"] == reply.json()["generation"]
        listed = other.http.get("/v1/replicas").json()
        assert all(each["current"] and each["generation"] == listed["generation"] for each in listed["replicas"])
        assert all(0 <= each["age"] < 10 for each in listed["replicas"])


def test_who_does_not_follow_is_named_and_the_change_is_made(server: RunningServer, problem: Problem) -> None:
    store = long_since(server).service.store
    store.replicas.report(STRANGER, "00000000-1", None, seconds=600)
    began = time.monotonic()
    reply = server.http.put("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.3"})
    told = problem(reply, 504, "not_everywhere")
    assert time.monotonic() - began >= 0.3
    assert {STRANGER} <= set(told["missing"]) <= {STRANGER, name_of(server)}  # it may not have told of itself yet
    assert (told["generation"], reply.headers["etag"]) == (generation(server), f'"{generation(server)}"')
    assert STRANGER in told["detail"]
    assert server.classify(TEXT).json()["erasure"]["concepts"] == ["Sports"]
    until(lambda: store.replicas.read().missing(generation(server)) == (STRANGER,))
    again = server.http.delete("/v1/erasures/World", params={"wait": "all", "wait_seconds": "0.05"})  # changes nothing
    assert problem(again, 504, "not_everywhere")["missing"] == [STRANGER]
    store.replicas.remove(STRANGER)
    assert server.http.delete("/v1/erasures/Sports", params={"wait": "all", **PATIENTLY}).status_code == 200


def test_many_who_wait_hold_up_nobody_else(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads for the store."""
    monkeypatch.setattr("app.store_calls.PATIENCE", 60.0)  # a slow machine's calls take turns for long
    long_since(server).service.store.replicas.report(STRANGER, "00000000-1", None, seconds=600)
    waits = {"wait": "all", "wait_seconds": "50"}
    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(server.http.delete, "/v1/erasures/Sports", params=waits, timeout=90) for _ in range(40)]
        for _ in range(20):
            assert server.http.get("/v1/range-sets").status_code == 200
        state = server.http.put("/v1/erasures/World", json={}).json()["generation"]
        assert not any(each.done() for each in waiting)
        server.service.store.replicas.report(STRANGER, state, None)
        assert {each.result().status_code for each in waiting} == {200}


def test_a_roster_that_was_emptied_is_not_taken_for_everybody(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = long_since(server).service.store
    with monkeypatch.context() as patched:
        patched.setattr(replicas, "SILENT_SECONDS", 600.0)
        store.client.delete(store.keys.replicas)
        reply = server.http.delete("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.05"})
        problem(reply, 504, "not_everywhere")
        until(lambda: server.http.get("/v1/replicas").json()["replicas"])
        reply = server.http.delete("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.2"})
        assert problem(reply, 504, "not_everywhere")["missing"] == []
    assert server.http.delete("/v1/erasures/Sports", params={"wait": "all", **PATIENTLY}).status_code == 200


def test_a_server_that_cannot_report_says_so(server: RunningServer, problem: Problem) -> None:
    store = server.service.store
    store.client.delete(store.keys.replicas)
    store.client.set(store.keys.replicas, "another application's")
    reply = server.http.put("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.2"})
    assert generation(server) in problem(reply, 503, "store_unavailable")["detail"], "it is made"
    assert server.classify(TEXT).json()["erasure"]["concepts"] == ["Sports"]
    problem(server.http.get("/v1/replicas"), 503, "store_unavailable")


def test_prometheus_is_told_where_the_replicas_of_a_fleet_have_their_metrics(
    two_models: RunningServer, problem: Problem
) -> None:
    path = "/v1/replicas/targets"
    assert two_models.http.get(path).json() == [], "these have none of their own"
    first, second = two_models.services
    first.store.replicas.report("node-1:7:ab", "00000000-1", None, seconds=600, metrics="10.0.0.1:8002")
    first.store.replicas.report(STRANGER, "00000000-1", None, seconds=600)
    second.store.replicas.report("node-2:7:ab", None, None, seconds=1.0, metrics="[fe80::2]:9")

    def target(service: Service, address: str, node: str) -> dict[str, Any]:
        labels = {"model": service.name, "replica": f"{node}:7:ab", "node": node}
        return {"targets": [address], "labels": labels}

    both = [target(first, "10.0.0.1:8002", "node-1"), target(second, "[fe80::2]:9", "node-2")]
    reply = two_models.http.get(path)
    assert reply.headers["content-type"] == "application/json", "Prometheus takes no other"
    assert reply.json() in (both, both[:1])
    assert two_models.http.get(path, params={"model": first.name}).json() == both[:1]
    server, thread = start_metrics_server(0, "127.0.0.1", two_models.registry, two_models.services)
    try:
        apart = f"http://127.0.0.1:{server.server_port}"
        assert httpx.get(f"{apart}/metrics").text.count("neuronlens_ready{") == 2
        until(lambda: httpx.get(f"{apart}{path}").json() == both[:1])  # who is killed is forgotten
        first.store.replicas.remove("node-1:7:ab")
        assert httpx.get(f"{apart}{path}").json() == two_models.http.get(path).json() == []
        first.store.client.delete(first.store.keys.replicas)
        first.store.client.set(first.store.keys.replicas, "another application's")
        assert httpx.get(f"{apart}{path}").status_code == 503, "then Prometheus keeps those that it knows"
        problem(two_models.http.get(path), 503, "store_unavailable")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_that_drains_is_not_waited_for(start_server: Callable[..., RunningServer], fitted: Fitted) -> None:
    one = long_since(with_ranges(start_server(), fitted))
    other = start_server(name=one.service.name, poll_seconds=300.0)
    other.service.drain()
    until(lambda: len(one.http.get("/v1/replicas").json()["replicas"]) == 1)
    assert one.http.put("/v1/erasures/Sports", params={"wait": "all", **PATIENTLY}).status_code == 200
    assert other.http.delete("/v1/erasures/Sports", params={"wait": "all", **PATIENTLY}).status_code == 200


@pytest.mark.parametrize(
    "params", [{"wait": "some"}, {"wait": ""}, {"wait": "all", "wait_seconds": "0"}, {"wait_seconds": "nan"}]
)
def test_what_is_no_way_to_wait_changes_nothing(
    server: RunningServer, problem: Problem, params: dict[str, str]
) -> None:
    before = generation(server)
    problem(server.http.put("/v1/erasures/Sports", params=params), 422, "invalid")
    assert generation(server) == before


def test_a_generation_is_read_at_once_where_a_request_wants_it(deaf: RunningServer) -> None:
    for ask in (
        lambda state: deaf.classify(TEXT, min_generation=state),
        lambda state: deaf.http.post("/v1/classify", json={"inputs": TEXT}, headers={HEADER: state}),
    ):
        for _ in range(10):  # it may just be reading what `ready` announced
            state = unannounced(deaf)
            if deaf.classify(TEXT).json()["erasure"]["generation"] != state.generation:
                break
        else:
            pytest.fail("it reads by itself")
        answer = ask(state.generation)
        assert answer.status_code == 200, answer.text
        assert answer.json()["erasure"]["generation"] == state.generation
        assert answer.json()["erasure"]["concepts"] == ["World"]
        assert deaf.classify(TEXT, min_generation=after(state.generation, -1)).status_code == 200


def test_a_generation_that_comes_while_a_request_waits_is_taken(deaf: RunningServer) -> None:
    wanted = after(generation(deaf), 1)
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(deaf.classify, TEXT, min_generation=wanted, erase=[]) for _ in range(20)]
        assert unannounced(deaf).generation == wanted
        assert {each.result().json()["erasure"]["generation"] for each in asked} == {wanted}


def test_who_is_behind_says_what_it_has(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = generation(server)
    epoch = held.split("-")[0]
    anew = f"{(int(epoch, 16) + 1) % 2**32:08x}-0"
    monkeypatch.setattr(following, "PATIENCE", 25.0)
    began = time.monotonic()
    told = problem(server.classify(TEXT, min_generation=anew), 503, "behind")
    assert time.monotonic() - began < 20, "another epoch's generation never comes"
    assert (told["generation"], "epoch" in told["detail"]) == (held, True)
    never = after(held, 7)
    headers = {HEADER: never}
    monkeypatch.setattr(following, "PATIENCE", 0.1)
    dropin: list[tuple[str, dict[str, Any]]] = [
        ("/v1/classify", {"inputs": TEXT}),
        ("/v1/classify", {"inputs": TEXT, "erase": []}),
        ("/", {"inputs": TEXT}),
        ("/predict", {"inputs": TEXT}),
        ("/classify", {"input": TEXT}),
        (
            f"/v2/models/{server.service.name}/infer",
            {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT]}]},
        ),
    ]
    for path, body in dropin:
        reply = server.http.post(path, json=body, headers=headers)
        assert problem(reply, 503, "behind")["generation"] == held
        assert int(reply.headers["retry-after"]) >= 1
        good = server.http.post(path, json=body, headers={HEADER: held})
        assert good.status_code == 200, good.text


@pytest.mark.parametrize("wrong", ["", "7", "00000000-", "0000000g-1", "00000000-01", "00000000-1 ", "00000000-٣"])
def test_what_is_no_generation_is_refused(server: RunningServer, problem: Problem, wrong: str) -> None:
    problem(server.classify(TEXT, min_generation=wrong), 422, "invalid")
    if wrong.strip() == wrong:  # else it is no header
        reply = server.http.post("/predict", json={"inputs": TEXT}, headers={HEADER: wrong.encode()})
        problem(reply, 422, "invalid")


def test_two_generations_at_once_are_refused(server: RunningServer, problem: Problem) -> None:
    held = generation(server)
    body = {"inputs": TEXT, "min_generation": held}
    assert server.http.post("/v1/classify", json=body, headers={HEADER: held}).status_code == 200
    problem(server.http.post("/v1/classify", json=body, headers={HEADER: after(held, 1)}), 422, "invalid")


def test_an_enforced_erasure_holds_for_requests_with_erasures_of_their_own(deaf: RunningServer) -> None:
    store = deaf.service.store
    before = store.live()
    enforced = LiveErasure(erasure=Erasure(concept="World"), enforced=True)
    state = before.advanced(before.range_set, (enforced,))
    store.client.set(store.keys.live, state.model_dump_json())
    answer = deaf.classify(TEXT, erase=["Sports"], min_generation=state.generation).json()
    assert answer["erasure"]["concepts"] == ["World", "Sports"]


def test_a_server_that_was_silent_reads_before_it_answers(deaf: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have given it up, and been told that a change is everywhere."""
    monkeypatch.setattr(following, "LAPSED_PATIENCE", 20.0)
    monkeypatch.setattr(reporter, "SILENT_SECONDS", -1.0)
    state = unannounced(deaf)
    assert deaf.classify(TEXT).json()["erasure"]["generation"] == state.generation
