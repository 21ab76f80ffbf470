"""`?wait=all`, `min_generation`, `/v1/replicas` on servers of one process; `faults/test_replicas.py` has processes."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.serving.metrics import start_metrics_server
from app.serving.service import Service
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure, LiveState
from range_store.storage import heartbeat, replicas
from range_store.storage.replicas import SILENT_SECONDS
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.engine import generation_wait
from workers.fitting.fit import FitResult

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty"
HEADER = "X-NeuronLens-Min-Generation"
SILENT_REPLICA = "elsewhere:1:ab"
WAIT_LONG = {"wait": "all", "wait_seconds": "25"}


def settle_replicas(running: RunningServer) -> RunningServer:
    """Date the list of replicas back, so that a replica which is missing from it counts as gone."""
    store = running.service.store
    until(lambda: store.replicas.read().replicas)
    store.client.hset(store.keys.replicas, "since", str(time.time() - 10 * SILENT_SECONDS))
    return running


def replica_name(running: RunningServer) -> str:
    assert running.service.mirror.heartbeat is not None
    return running.service.mirror.heartbeat.name


def generation(running: RunningServer) -> str:
    current: str = running.http.get("/v1/erasures").json()["generation"]
    return current


def advance(generation: str, steps: int) -> str:
    """The generation that comes `steps` changes later."""
    epoch, counter = generation.split("-")
    return f"{epoch}-{int(counter) + steps}"


@pytest.fixture
def passive_server(
    start_server: Callable[..., RunningServer], fitted: FitResult, monkeypatch: pytest.MonkeyPatch
) -> RunningServer:
    """A server that reads the live state only when a request makes it do so."""
    monkeypatch.setattr(generation_wait, "MAX_SECONDS", 25.0)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 3600.0)
    running = with_ranges(start_server(), fitted)
    mirror = running.service.mirror
    assert mirror._thread is not None
    mirror._stopping.set()
    mirror._thread.join()
    return running


def change_behind(running: RunningServer, *, enforced: bool = False) -> LiveState:
    """Erase World directly in the store; gives the new live state."""
    store = running.service.store
    before = store.live_state()
    erasure = LiveErasure(erasure=Erasure(concept="World"), enforced=enforced)
    state = before.next_generation(before.range_set, (erasure,))
    store.client.set(store.keys.live, state.model_dump_json())
    return state


def test_change_with_wait_all_is_in_force_on_every_server(
    start_server: Callable[..., RunningServer], fitted: FitResult
) -> None:
    first = settle_replicas(with_ranges(start_server(), fitted))
    second = start_server(name=first.service.name)
    listed = first.http.get("/v1/replicas").json()
    assert {(each["name"], each["this"]) for each in listed["replicas"]} == {
        (replica_name(first), True),
        (replica_name(second), False),
    }
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("PUT", "/v1/erasures/Sports", {}),
        ("PUT", "/v1/erasures", {"erasures": [{"concept": "World"}]}),
        ("PUT", "/v1/range-sets/active", {"id": fitted.range_set.id}),
        ("DELETE", "/v1/erasures/World", {}),
        ("DELETE", "/v1/erasures/World", {}),  # changes nothing, but waits all the same
    ]
    for method, path, body in calls:
        reply = first.http.request(method, path, json=body or None, params=WAIT_LONG)
        assert reply.status_code == 200, reply.text
        assert generation(second) == reply.json()["generation"]
        assert second.classify(TEXT).json()["erasure"]["generation"] == reply.json()["generation"]
        listed = second.http.get("/v1/replicas").json()
        assert all(each["current"] and each["generation"] == listed["generation"] for each in listed["replicas"])
        assert all(0 <= each["age"] < 10 for each in listed["replicas"])


def test_timeout_of_wait_all_names_the_missing_replicas(server: RunningServer, problem: Problem) -> None:
    """The change itself is made."""
    store = settle_replicas(server).service.store
    store.replicas.report(SILENT_REPLICA, "00000000-1", None, seconds=600)
    began = time.monotonic()
    reply = server.http.put("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.3"})
    body = problem(reply, 504, "not_everywhere")
    assert time.monotonic() - began >= 0.3
    # the server's own report may still be on its way
    assert {SILENT_REPLICA} <= set(body["missing"]) <= {SILENT_REPLICA, replica_name(server)}
    assert (body["generation"], reply.headers["etag"]) == (generation(server), f'"{generation(server)}"')
    assert SILENT_REPLICA in body["detail"]
    assert server.classify(TEXT).json()["erasure"]["concepts"] == ["Sports"]
    until(lambda: store.replicas.read().missing(generation(server)) == (SILENT_REPLICA,))
    unchanged = server.http.delete("/v1/erasures/World", params={"wait": "all", "wait_seconds": "0.05"})
    assert problem(unchanged, 504, "not_everywhere")["missing"] == [SILENT_REPLICA]
    store.replicas.remove(SILENT_REPLICA)
    assert server.http.delete("/v1/erasures/Sports", params=WAIT_LONG).status_code == 200


def test_many_waiting_requests_do_not_block_others(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more of them than threads for store calls."""
    monkeypatch.setattr("app.live.store_threads.PATIENCE", 60.0)
    store = settle_replicas(server).service.store
    store.replicas.report(SILENT_REPLICA, "00000000-1", None, seconds=600)
    waits = {"wait": "all", "wait_seconds": "60"}
    with ThreadPoolExecutor(40) as pool:
        waiting = [pool.submit(server.http.delete, "/v1/erasures/Sports", params=waits, timeout=90) for _ in range(40)]
        for _ in range(20):
            assert server.http.get("/v1/range-sets").status_code == 200
        state = server.http.put("/v1/erasures/World", json={}).json()["generation"]
        assert not any(each.done() for each in waiting)
        store.replicas.report(SILENT_REPLICA, state, None)
        assert {each.result().status_code for each in waiting} == {200}
    store.replicas.remove(SILENT_REPLICA)


def test_emptied_replica_list_does_not_count_as_complete(
    fresh_server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, store = fresh_server.http, settle_replicas(fresh_server).service.store
    monkeypatch.setattr(replicas, "SILENT_SECONDS", 600.0)
    store.client.delete(store.keys.replicas)
    reply = http.delete("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.05"})
    problem(reply, 504, "not_everywhere")
    fresh_server.service.mirror.heartbeat.read_and_report()  # type: ignore[union-attr]
    reply = http.delete("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.05"})
    assert problem(reply, 504, "not_everywhere")["missing"] == []
    monkeypatch.setattr(replicas, "SILENT_SECONDS", 0.0)
    assert http.delete("/v1/erasures/Sports", params=WAIT_LONG).status_code == 200


def test_server_that_cannot_report_answers_503_but_makes_the_change(
    fresh_server: RunningServer, problem: Problem
) -> None:
    store = fresh_server.service.store
    store.client.delete(store.keys.replicas)
    store.client.set(store.keys.replicas, "another application's")
    reply = fresh_server.http.put("/v1/erasures/Sports", params={"wait": "all", "wait_seconds": "0.05"})
    assert generation(fresh_server) in problem(reply, 503, "store_unavailable")["detail"]
    assert fresh_server.classify(TEXT).json()["erasure"]["concepts"] == ["Sports"]
    problem(fresh_server.http.get("/v1/replicas"), 503, "store_unavailable")


def test_prometheus_finds_the_metrics_of_every_replica(two_models: RunningServer, problem: Problem) -> None:
    path = "/v1/replicas/targets"
    assert two_models.http.get(path).json() == [], "these servers have no metrics address"
    first, second = two_models.services
    first.store.replicas.report("node-1:7:ab", "00000000-1", None, seconds=600, metrics="10.0.0.1:8002")
    first.store.replicas.report(SILENT_REPLICA, "00000000-1", None, seconds=600)
    second.store.replicas.report("node-2:7:ab", None, None, seconds=600, metrics="[fe80::2]:9")

    def target(service: Service, address: str, node: str) -> dict[str, Any]:
        labels = {"model": service.name, "replica": f"{node}:7:ab", "node": node}
        return {"targets": [address], "labels": labels}

    both = [target(first, "10.0.0.1:8002", "node-1"), target(second, "[fe80::2]:9", "node-2")]
    reply = two_models.http.get(path)
    assert reply.headers["content-type"] == "application/json", "Prometheus accepts no other media type"
    assert reply.json() == both
    assert two_models.http.get(path, params={"model": first.name}).json() == both[:1]
    server, thread = start_metrics_server(0, "127.0.0.1", two_models.registry, two_models.services)
    try:
        metrics_url = f"http://127.0.0.1:{server.server_port}"
        assert httpx.get(f"{metrics_url}/metrics").text.count("neuronlens_ready{") == 2
        assert httpx.get(f"{metrics_url}{path}").json() == both
        second.store.replicas.report("node-2:7:ab", None, None, seconds=0.001)
        until(lambda: httpx.get(f"{metrics_url}{path}").json() == both[:1])  # an expired report is forgotten
        first.store.replicas.remove("node-1:7:ab")
        assert httpx.get(f"{metrics_url}{path}").json() == two_models.http.get(path).json() == []
        first.store.client.delete(first.store.keys.replicas)
        first.store.client.set(first.store.keys.replicas, "another application's")
        assert httpx.get(f"{metrics_url}{path}").status_code == 503, "Prometheus then keeps the targets that it knows"
        problem(two_models.http.get(path), 503, "store_unavailable")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_draining_server_is_not_waited_for(start_server: Callable[..., RunningServer], fitted: FitResult) -> None:
    first = settle_replicas(with_ranges(start_server(), fitted))
    draining = start_server(name=first.service.name, poll_seconds=300.0)
    draining.service.drain()
    until(lambda: len(first.http.get("/v1/replicas").json()["replicas"]) == 1)
    assert first.http.put("/v1/erasures/Sports", params=WAIT_LONG).status_code == 200
    assert draining.http.delete("/v1/erasures/Sports", params=WAIT_LONG).status_code == 200


@pytest.mark.parametrize(
    "params", [{"wait": "some"}, {"wait": ""}, {"wait": "all", "wait_seconds": "0"}, {"wait_seconds": "nan"}]
)
def test_invalid_wait_parameters_change_nothing(
    server: RunningServer, problem: Problem, params: dict[str, str]
) -> None:
    before = generation(server)
    problem(server.http.put("/v1/erasures/Sports", params=params), 422, "invalid")
    assert generation(server) == before


@pytest.mark.parametrize("place", ["body", "header"])
def test_min_generation_makes_the_server_read_the_store(passive_server: RunningServer, place: str) -> None:
    wanted = change_behind(passive_server).generation
    assert passive_server.classify(TEXT).json()["erasure"]["generation"] != wanted
    if place == "body":
        answer = passive_server.classify(TEXT, min_generation=wanted)
    else:
        answer = passive_server.http.post("/v1/classify", json={"inputs": TEXT}, headers={HEADER: wanted})
    assert answer.status_code == 200, answer.text
    assert answer.json()["erasure"]["generation"] == wanted
    assert answer.json()["erasure"]["concepts"] == ["World"]
    assert passive_server.classify(TEXT, min_generation=advance(wanted, -1)).status_code == 200


def test_requests_wait_for_a_generation_that_is_yet_to_come(passive_server: RunningServer) -> None:
    wanted = advance(generation(passive_server), 1)
    waiting = passive_server.service.engine._planner._generation_wait
    with ThreadPoolExecutor(20) as pool:
        replies = [pool.submit(passive_server.classify, TEXT, min_generation=wanted, erase=[]) for _ in range(20)]
        until(lambda: waiting.waiting == 20)
        assert change_behind(passive_server).generation == wanted
        assert {each.result().json()["erasure"]["generation"] for each in replies} == {wanted}


def test_server_that_is_behind_names_the_generation_it_has(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = generation(server)
    epoch = held.split("-")[0]
    other_epoch = f"{(int(epoch, 16) + 1) % 2**32:08x}-0"
    monkeypatch.setattr(generation_wait, "MAX_SECONDS", 600.0)  # it is not waited for: another epoch never comes
    body = problem(server.classify(TEXT, min_generation=other_epoch), 503, "behind")
    assert (body["generation"], "epoch" in body["detail"]) == (held, True)
    headers = {HEADER: advance(held, 7)}
    monkeypatch.setattr(generation_wait, "MAX_SECONDS", 0.1)
    calls: list[tuple[str, dict[str, Any]]] = [
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
    for path, sent in calls:
        reply = server.http.post(path, json=sent, headers=headers)
        assert problem(reply, 503, "behind")["generation"] == held
        assert int(reply.headers["retry-after"]) >= 1
        accepted = server.http.post(path, json=sent, headers={HEADER: held})
        assert accepted.status_code == 200, accepted.text


@pytest.mark.parametrize("wrong", ["", "7", "00000000-", "0000000g-1", "00000000-01", "00000000-1 ", "00000000-٣"])
def test_malformed_generation_is_rejected(server: RunningServer, problem: Problem, wrong: str) -> None:
    problem(server.classify(TEXT, min_generation=wrong), 422, "invalid")
    if wrong.strip() == wrong:  # HTTP strips a header's value
        reply = server.http.post("/predict", json={"inputs": TEXT}, headers={HEADER: wrong.encode()})
        problem(reply, 422, "invalid")


def test_different_generations_in_body_and_header_are_rejected(server: RunningServer, problem: Problem) -> None:
    held = generation(server)
    body = {"inputs": TEXT, "min_generation": held}
    assert server.http.post("/v1/classify", json=body, headers={HEADER: held}).status_code == 200
    problem(server.http.post("/v1/classify", json=body, headers={HEADER: advance(held, 1)}), 422, "invalid")


def test_enforced_erasure_applies_to_a_request_with_its_own_erasures(passive_server: RunningServer) -> None:
    state = change_behind(passive_server, enforced=True)
    answer = passive_server.classify(TEXT, erase=["Sports"], min_generation=state.generation).json()
    assert answer["erasure"]["concepts"] == ["World", "Sports"]


def test_server_reads_the_store_after_a_silence_before_it_answers(
    passive_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have stopped waiting for it, and may have reported a change as in force everywhere."""
    monkeypatch.setattr(generation_wait, "LAPSED_SECONDS", 20.0)
    until(lambda: passive_server.service.mirror.heartbeat._reported_at)  # type: ignore[union-attr]
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", -1.0)
    state = change_behind(passive_server)
    assert passive_server.classify(TEXT).json()["erasure"]["generation"] == state.generation
