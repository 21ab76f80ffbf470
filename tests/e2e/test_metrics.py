"""What /metrics says of a running service: readiness, what is erased, what changed, and what is loaded."""

import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from range_store.erasure import Erasure
from range_store.keys import ModelKeys
from range_store.live import LiveErasure
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from workers.engine.metrics import MOST_CONCEPTS, OTHER_CONCEPTS
from workers.fitting.fit import Fitted


def series(running: RunningServer, name: str) -> dict[tuple[str, ...], float]:
    """Samples of one name, by the values of their labels but `model`, in the labels' alphabetical order."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "model"): sample.value
        for family in text_string_to_metric_families(running.http.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


def test_ready_is_what_readyz_says(start_server: Callable[..., RunningServer], fitted: Fitted) -> None:
    running = start_server()
    steps: tuple[tuple[float, Callable[[], object]], ...] = (
        (0.0, lambda: None),
        (1.0, lambda: with_ranges(running, fitted)),
        (0.0, running.service.engine.drain),
    )
    for expected, step in steps:
        step()
        reply = running.http.get("/readyz")
        assert series(running, "neuronlens_ready") == {(): expected}
        assert reply.status_code == (200 if expected else 503)
        told = {(name,): float(good) for name, good in reply.json()["checks"].items() if name != "store"}
        assert series(running, "neuronlens_ready_condition") == told


def test_what_is_erased_now_is_told_by_concept_until_it_expires(server: RunningServer) -> None:
    server.http.put("/v1/erasures/Sports", json={"enforced": True})
    on = server.http.put("/v1/erasures/World", json={"method": "neuron", "expires_in": 2}).json()
    (expires_at,) = (each["expires_at"] for each in on["erasures"] if each["concept"] == "World")
    told = series(server, "neuronlens_live_erasure")
    if time.time() < expires_at:
        assert told == {("Sports", "true", "range"): 1.0, ("World", "false", "neuron"): 1.0}
    until(lambda: series(server, "neuronlens_live_erasures") == {(): 1.0})
    assert series(server, "neuronlens_live_erasure") == {("Sports", "true", "range"): 1.0}


def test_changes_are_counted_by_kind_and_concept(server: RunningServer) -> None:
    before = series(server, "neuronlens_live_changes_total")
    began = time.time()
    server.http.put("/v1/erasures/Sports", json={})
    server.http.put("/v1/erasures/Sports", json={"tau": 1.0})
    server.http.put("/v1/erasures", json={"erasures": [{"concept": "World"}]})
    after = series(server, "neuronlens_live_changes_total")
    grown = {change: after[change,] - before[change,] for change in ("on", "off", "settings", "range_set")}
    assert grown == {"on": 2, "off": 1, "settings": 1, "range_set": 0}
    changed = series(server, "neuronlens_live_changed_timestamp_seconds")
    assert {key for key, when in changed.items() if when >= began} == {
        ("on", "Sports"),
        ("settings", "Sports"),
        ("off", "Sports"),
        ("on", "World"),
    }


def test_a_live_state_that_began_anew_is_a_change_of_its_own(server: RunningServer) -> None:
    server.http.put("/v1/erasures/Sports", json={})
    (before,) = {epoch for epoch, _ in series(server, "neuronlens_live_info")}
    changes = series(server, "neuronlens_live_changes_total")
    server.service.store.client.delete(ModelKeys(server.service.name).live)
    until(lambda: {epoch for epoch, _ in series(server, "neuronlens_live_info")} != {before})
    until(lambda: series(server, "neuronlens_live_changes_total") == changes | {("anew",): 1.0})
    assert series(server, "neuronlens_live_erasures") == {(): 1.0}


def test_concepts_beyond_the_bound_share_a_series(server: RunningServer) -> None:
    many = [LiveErasure(erasure=Erasure(concept=f"concept {n:04}")) for n in range(MOST_CONCEPTS + 5)]
    snapshot = server.service.mirror.snapshot
    assert snapshot is not None
    state = snapshot.live.model_copy(update={"erasures": tuple(many)})
    server.service.store.client.set(ModelKeys(server.service.name).live, state.model_dump_json())
    server.service.store.client.publish("neuronlens:changes", "{}")
    until(lambda: len(series(server, "neuronlens_live_erasure")) == MOST_CONCEPTS + 1)
    assert series(server, "neuronlens_live_erasure")[OTHER_CONCEPTS, "false", "range"] == 5
    changed = "neuronlens_live_changed_timestamp_seconds"
    until(lambda: len(series(server, changed)) == MOST_CONCEPTS + 2)  # and the range set's


def test_what_is_loaded_and_its_limits(start_server: Callable[..., RunningServer]) -> None:
    running = start_server(max_queue_tokens=1000, max_queue_texts=10, max_batch_tokens=64)
    model = running.service.model
    (labels,) = series(running, "neuronlens_model_info")
    assert labels == (
        "cpu",
        "float32",
        "bert",
        model.identity.fingerprint,
        "sequence-classification",
    )
    for name, limit in (("queue_tokens", 1000), ("queue_texts", 10), ("batch_tokens", 64)):
        assert series(running, f"neuronlens_{name}_limit") == {(): limit}
    assert series(running, "process_resident_memory_bytes")[()] > 0
    assert list(series(running, "neuronlens_build_info").values()) == [1]


def test_a_lost_live_state_has_a_name(server: RunningServer) -> None:
    def problems() -> set[str]:
        return {problem for (problem,), on in series(server, "neuronlens_live_state_problem").items() if on}

    assert problems() == set()
    server.http.put("/v1/erasures/Sports", json={})
    keys = ModelKeys(server.service.name)
    server.service.store.client.delete(keys.live, keys.range_sets)  # at once: the live state alone would be put back
    until(lambda: problems() == {"lost"})
    assert series(server, "neuronlens_store_up") == {(): 1.0}
    assert series(server, "neuronlens_live_erasures") == {(): 1.0}
