"""`GET /metrics` of a running service: readiness, live erasures, their changes, and the loaded model."""

import time
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.clock import StoreClock
from range_store.storage.schema import ModelKeys
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.engine.metrics import MAX_CONCEPTS, OTHER_CONCEPTS
from workers.fitting.fit import FitResult


def series(server: RunningServer, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of one name by the values of their labels, which are sorted by name and leave out `model`."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "model"): sample.value
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def test_ready_metrics_agree_with_readyz(start_server: Callable[..., RunningServer], fitted: FitResult) -> None:
    server = start_server()
    steps: tuple[tuple[float, Callable[[], object]], ...] = (
        (0.0, lambda: None),
        (1.0, lambda: with_ranges(server, fitted)),
        (0.0, server.service.engine.drain),
    )
    for ready, step in steps:
        step()
        reply = server.http.get("/readyz")
        assert reply.status_code == (200 if ready else 503)
        assert series(server, "neuronlens_ready") == {(): ready}
        checks = {(name,): float(holds) for name, holds in reply.json()["checks"].items() if name != "store"}
        assert series(server, "neuronlens_ready_condition") == checks


def test_live_erasure_metrics_list_concepts_until_they_expire(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(StoreClock, "now", lambda clock: now)
    server.http.put("/v1/erasures/Sports", json={"enforced": True})
    server.http.put("/v1/erasures/World", json={"method": "neuron", "expires_in": 60})
    now += 59
    both = {("Sports", "true", "range"): 1.0, ("World", "false", "neuron"): 1.0}
    assert series(server, "neuronlens_live_erasure") == both
    assert series(server, "neuronlens_live_erasures") == {(): 2.0}
    now += 1
    assert series(server, "neuronlens_live_erasure") == {("Sports", "true", "range"): 1.0}
    assert series(server, "neuronlens_live_erasures") == {(): 1.0}


def test_changes_are_counted_by_kind_and_dated_by_concept(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = series(server, "neuronlens_live_changes_total")
    now = time.time() + 1
    monkeypatch.setattr(time, "time", lambda: now)
    server.http.put("/v1/erasures/Sports", json={})
    server.http.put("/v1/erasures/Sports", json={"tau": 1.0})
    server.http.put("/v1/erasures", json={"erasures": [{"concept": "World"}]})
    after = series(server, "neuronlens_live_changes_total")
    increase = {change: after[change,] - before[change,] for change in ("on", "off", "settings", "range_set")}
    assert increase == {"on": 2, "off": 1, "settings": 1, "range_set": 0}
    changed = series(server, "neuronlens_live_changed_timestamp_seconds")
    assert {key for key, changed_at in changed.items() if changed_at == now} == {
        ("on", "Sports"),
        ("settings", "Sports"),
        ("off", "Sports"),
        ("on", "World"),
    }


def test_restored_live_state_is_counted_as_a_change(fresh_server: RunningServer) -> None:
    fresh_server.http.put("/v1/erasures/Sports", json={})
    (before,) = {epoch for epoch, _ in series(fresh_server, "neuronlens_live_info")}
    changes = series(fresh_server, "neuronlens_live_changes_total")
    fresh_server.service.store.client.delete(ModelKeys(fresh_server.service.name).live)
    until(lambda: {epoch for epoch, _ in series(fresh_server, "neuronlens_live_info")} != {before})
    until(lambda: series(fresh_server, "neuronlens_live_changes_total") == changes | {("anew",): 1.0})
    assert series(fresh_server, "neuronlens_live_erasures") == {(): 1.0}


def test_concepts_beyond_the_limit_share_a_series(fresh_server: RunningServer) -> None:
    many = [LiveErasure(erasure=Erasure(concept=f"concept {n:04}")) for n in range(MAX_CONCEPTS + 5)]
    snapshot = fresh_server.service.mirror.snapshot
    assert snapshot is not None
    state = snapshot.live.next_generation(snapshot.live.range_set, tuple(many))
    fresh_server.service.store.client.set(ModelKeys(fresh_server.service.name).live, state.model_dump_json())
    fresh_server.service.store.client.publish("neuronlens:changes", "{}")
    until(lambda: len(series(fresh_server, "neuronlens_live_erasure")) == MAX_CONCEPTS + 1)
    assert series(fresh_server, "neuronlens_live_erasure")[OTHER_CONCEPTS, "false", "range"] == 5
    changed = "neuronlens_live_changed_timestamp_seconds"
    until(lambda: len(series(fresh_server, changed)) == MAX_CONCEPTS + 2)  # with the one of the range set


def test_metrics_show_the_loaded_model_and_its_limits(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(max_queue_tokens=1000, max_queue_texts=10, max_batch_tokens=64)
    model = server.service.model
    (labels,) = series(server, "neuronlens_model_info")
    assert labels == ("cpu", "float32", "bert", model.identity.fingerprint, "sequence-classification")
    for name, limit in (("queue_tokens", 1000), ("queue_texts", 10), ("batch_tokens", 64)):
        assert series(server, f"neuronlens_{name}_limit") == {(): limit}
    assert series(server, "process_resident_memory_bytes")[()] > 0
    assert list(series(server, "neuronlens_build_info").values()) == [1]


def test_lost_live_state_is_reported_as_a_problem(fresh_server: RunningServer) -> None:

    def problems() -> set[str]:
        return {problem for (problem,), on in series(fresh_server, "neuronlens_live_state_problem").items() if on}

    assert problems() == set()
    fresh_server.http.put("/v1/erasures/Sports", json={})
    keys = ModelKeys(fresh_server.service.name)
    fresh_server.service.store.client.delete(keys.live, keys.range_sets)  # the live state alone would be restored
    until(lambda: problems() == {"lost"})
    assert series(fresh_server, "neuronlens_store_up") == {(): 1.0}
    assert series(fresh_server, "neuronlens_live_erasures") == {(): 1.0}
