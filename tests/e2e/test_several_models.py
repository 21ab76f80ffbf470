"""Several models in one process: each is addressed by its name, and has live erasures of its own."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from app.main import create_app
from app.openapi import document
from app.service import Service
from app.settings import Settings
from range_store.api_keys import KeyStore
from range_store.embedded import EmbeddedRedis
from tests.range_store.waiting import until
from tests.servers import RunningServer, ranges_of
from workers.models.loading import LoadedModel

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXTS = ["the keeper saved a penalty", "a cat sat there", "rain in Oslo"]


def answers(running: RunningServer, model: str, **fields: Any) -> dict[str, Any]:
    reply = running.classify(TEXTS, model=model, **fields)
    assert reply.status_code == 200, reply.text
    said: dict[str, Any] = reply.json()
    assert said.pop("model") == model
    return said


def test_a_toggle_on_one_changes_nothing_of_the_other(two_models: RunningServer) -> None:
    one, other = (service.name for service in two_models.services)
    everything = {"top_fraction": 1.0, "method": "neuron", "model": other}
    before = {name: answers(two_models, name) for name in (one, other)}
    generation = two_models.http.get("/v1/erasures").headers["etag"]

    changed = two_models.http.put("/v1/erasures/Sports", json=everything)
    assert (changed.status_code, changed.json()["model"]) == (200, other)
    assert answers(two_models, one) == before[one]
    assert two_models.http.get("/v1/erasures", params={"model": one}).headers["etag"] == generation
    after = answers(two_models, other)
    assert after["erasure"]["concepts"] == ["Sports"]
    assert after["results"] != before[other]["results"]

    # the same concept of the first is another one; the default is the first
    assert two_models.http.put("/v1/erasures/Sports", json={"top_fraction": 1.0}).json()["model"] == one
    assert answers(two_models, other) == after
    two_models.http.delete("/v1/erasures/Sports", params={"model": other}).raise_for_status()
    assert answers(two_models, other)["results"] == before[other]["results"]
    assert answers(two_models, one)["erasure"]["concepts"] == ["Sports"]
    audits = [two_models.http.get("/v1/audit", params={"model": name}).json()["entries"] for name in (one, other)]
    assert [sum("Sports" in entry["concepts"] for entry in entries) for entries in audits] == [1, 2]


def test_every_reading_route_answers_for_the_model_that_is_named(two_models: RunningServer) -> None:
    for service in two_models.services:
        of = {"model": service.name}
        listed = two_models.http.get("/v1/concepts", params=of).json()
        assert [each["concept"] for each in listed["concepts"]] == list(service.model.identity.labels)
        assert two_models.http.get("/v1/capabilities", params=of).json()["model"] == service.name
        (published,) = two_models.http.get("/v1/range-sets", params=of).json()["range_sets"]
        assert published["provenance"]["model"]["fingerprint"] == service.model.identity.fingerprint
        for path in ("/v1/concepts/Sports/ranges", "/v1/neurons/-1/0", "/v1/overlap", "/v1/jobs"):
            assert two_models.http.get(path, params=of).json()["model"] == service.name
        looked = two_models.http.post("/v1/activations", json={"inputs": TEXTS, "neurons": [0], **of}).json()
        assert (looked["model"], looked["layer"]) == (service.name, service.model.identity.n_layers - 1)
        with two_models.http.stream("GET", "/v1/events", params=of) as stream:
            lines = iter(stream.iter_lines())
            said = next(line for line in lines if line.startswith("data:"))
            assert json.loads(said.removeprefix("data:"))["model"] == service.name
    assert [each["id"] for each in two_models.http.get("/v1/models").json()["models"]] == [
        each.name for each in two_models.services
    ]


def test_other_protocols_name_a_model_as_they_can(two_models: RunningServer) -> None:
    for service in two_models.services:
        of, labels = {"model": service.name}, set(service.model.identity.labels)
        expected = [result["label"] for result in answers(two_models, service.name)["results"]]
        hugging = two_models.http.post("/", params=of, json={"inputs": TEXTS}).json()
        assert [each[0]["label"] for each in hugging] == expected
        predicted = two_models.http.post("/predict", params=of, json={"inputs": TEXTS}).json()
        assert [each[0]["label"] for each in predicted] == expected
        assert two_models.http.get("/info", params=of).json()["model_id"] == service.name
        vllm = two_models.http.post("/classify", json={"input": TEXTS, **of}).json()
        assert (vllm["model"], [each["label"] for each in vllm["data"]]) == (service.name, expected)
        tensor = {"name": "text", "datatype": "BYTES", "shape": [3], "data": TEXTS}
        infer = two_models.http.post(f"/v2/models/{service.name}/infer", json={"inputs": [tensor]}).json()
        assert (infer["model_name"], infer["outputs"][0]["data"]) == (service.name, expected)
        assert set(two_models.http.get(f"/v2/models/{service.name}").json()["parameters"]["labels"]) == labels


UNKNOWN = "no-such-model"


def operations() -> Iterator[tuple[str, str, bool, bool]]:
    """Method, path, and whether the query, the body may name a model: of every operation where any of it can."""
    described = json.loads(document())

    def fields(schema: Any) -> set[str]:
        if "$ref" in schema:
            return fields(described["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        inside = [fields(each) for each in (*schema.get("anyOf", ()), *schema.get("allOf", ()))]
        return set(schema.get("properties", {})).union(*inside)

    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            names = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"}
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            in_body = "model" in fields(content.get("schema", {}))
            if "model" in names or in_body or "{model}" in path:
                yield method.upper(), path, "model" in names, in_body


BODIES: dict[str, dict[str, Any]] = {
    "/v1/classify": {"inputs": "a"},
    "/v1/tokenize": {"inputs": "a"},
    "/v1/activations": {"inputs": "a", "neurons": [0]},
    "/v1/erasures": {"erasures": []},
    "/v1/erasures/{concept}": {},
    "/v1/range-sets/active": {"id": "any"},
    "/v1/fits": {"data": "any.jsonl"},
    "/classify": {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/": {"inputs": "a"},
    "/predict": {"inputs": "a"},
}
INFER = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}


def test_an_unknown_model_is_refused_wherever_one_can_be_named(two_models: RunningServer, problem: Problem) -> None:
    """Over the OpenAPI document: a new route that takes a model comes under this by itself."""
    found = list(operations())
    assert len(found) > 30
    before = [service.store.live() for service in two_models.services]
    named = [service.name for service in two_models.services]
    for method, path, in_query, in_body in found:
        where = re.sub(r"{(\w+)}", lambda part: {"model": UNKNOWN, "model_version": "1"}.get(part[1], "0"), path)
        where = where.replace("/reports/0/0", "/reports/0/run.json")
        body = {} if method in ("GET", "DELETE") else {"json": BODIES.get(path, INFER)}
        if "{model}" in path:
            replies = [two_models.http.request(method, where, **body)]
        else:
            replies = [two_models.http.request(method, where, params={"model": UNKNOWN}, **body)] if in_query else []
            if in_body:
                replies.append(two_models.http.request(method, where, json={**body["json"], "model": UNKNOWN}))
        assert replies
        for reply in replies:
            assert problem(reply, 404, "unknown_model")["known"] == named, (method, path)
    assert [service.store.live() for service in two_models.services] == before


def test_query_and_body_must_mean_the_same(two_models: RunningServer, problem: Problem) -> None:
    one, other = (service.name for service in two_models.services)
    problem(
        two_models.http.post("/v1/classify", params={"model": one}, json={"inputs": "a", "model": other}),
        422,
        "invalid",
    )
    refused = two_models.http.put("/v1/erasures/Sports", params={"model": one}, json={"model": other})
    problem(refused, 422, "invalid")
    same = two_models.http.post("/v1/classify", params={"model": other}, json={"inputs": "a", "model": other})
    assert same.json()["model"] == other


def test_ready_when_all_are(start_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel) -> None:
    running = start_server(model, other)
    one, two_models = running.services
    ranges_of(one, 1)
    assert running.http.get("/v2/health/ready").status_code == 503
    checks = running.http.get("/readyz").json()["checks"]
    assert {name: checks[f"{name}: range_set"] for name in (one.name, two_models.name)} == {
        one.name: True,
        two_models.name: False,
    }
    statuses = [running.http.get(f"/v2/models/{each.name}/ready").status_code for each in (one, two_models)]
    assert statuses == [200, 503]
    assert [
        running.registry.get_sample_value("neuronlens_ready", {"model": each.name}) for each in (one, two_models)
    ] == [
        1,
        0,
    ]
    assert answers(running, one.name)["results"], "it answers for itself meanwhile"
    ranges_of(two_models, 2)
    ready = running.http.get("/readyz")
    assert (ready.status_code, ready.json()["generation"]) == (200, None)


def test_metrics_are_of_each(two_models: RunningServer) -> None:
    one, other = (service.name for service in two_models.services)
    answers(two_models, other)
    two_models.http.put("/v1/erasures/Cats", params={"model": other}).raise_for_status()

    def of(model: str, name: str, **labels: str) -> float | None:
        return two_models.registry.get_sample_value(name, {"model": model, **labels})

    assert [of(name, "neuronlens_live_erasures") for name in (one, other)] == [0, 1]
    assert [of(name, "neuronlens_live_changes_total", change="on") for name in (one, other)] == [0, 1]
    assert [of(name, "neuronlens_tokens_total") == 0 for name in (one, other)] == [True, False]
    page = two_models.http.get("/metrics").text
    assert page.count("# TYPE neuronlens_queue_texts gauge\n") == 1, "one family, whoever many models"


def test_a_full_model_refuses_before_the_body_what_is_for_it_alone(
    start_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel, problem: Problem
) -> None:
    """And counts it; what may be for either is read first, unless both are full."""
    running = start_server(model, other, max_queue_texts=1)
    one, two_models = running.services
    for seed, service in enumerate(running.services):
        ranges_of(service, seed)

    def rejected(service: Service) -> float | None:
        return service.registry.get_sample_value("neuronlens_rejections_total", {"reason": "queue_full"})

    def fill(service: Service) -> list[threading.Thread]:
        """One text is in the model, and one waits, which is as many as may."""
        value = service.registry.get_sample_value
        asking = [threading.Thread(target=running.classify, args=("a",), kwargs={"model": service.name}) for _ in "ab"]
        before = value("neuronlens_queue_wait_seconds_count") or 0
        asking[0].start()
        until(lambda: value("neuronlens_queue_wait_seconds_count") == before + 1)
        asking[1].start()
        until(lambda: value("neuronlens_queue_texts") == 1)
        return asking

    def malformed(path: str, **named: str) -> httpx.Response:
        return running.http.post(path, params=named, content=b"{", headers={"Content-Type": "application/json"})

    with ExitStack() as held:
        held.enter_context(other.steered._lock)
        asking = fill(two_models)
        for path in ("/predict", "/v1/classify", "/"):
            problem(malformed(path, model=two_models.name), 429, "queue_full")
            problem(malformed(path), 400, "malformed")
        problem(malformed(f"/v2/models/{two_models.name}/infer"), 429, "queue_full")
        problem(malformed(f"/v2/models/{two_models.name}/versions/1/infer"), 429, "queue_full")
        assert (rejected(one), rejected(two_models)) == (0, 5)
        problem(running.classify("a", model=two_models.name), 429, "queue_full")
        assert (rejected(one), rejected(two_models)) == (0, 6)
        assert running.classify("a", model=one.name).json()["model"] == one.name
        held.enter_context(model.steered._lock)
        asking += fill(one)
        problem(malformed("/v1/classify"), 429, "queue_full")
        assert (rejected(one), rejected(two_models)) == (1, 6)
    for thread in asking:
        thread.join()


def test_keys_are_the_same_for_all(
    own_redis: EmbeddedRedis,
    start_server: Callable[..., RunningServer],
    model: LoadedModel,
    other: LoadedModel,
    problem: Problem,
) -> None:
    tokens = {scope: KeyStore(own_redis).create(f"the-{scope}", [scope])[1] for scope in ("infer", "admin")}
    running = start_server(model, other, redis_url=own_redis.url)
    for seed, service in enumerate(running.services):
        ranges_of(service, seed)
        of = {"model": service.name}
        problem(running.http.get("/v1/erasures", params=of), 401, "no_key")
        infer, admin = ({"Authorization": f"Bearer {token}"} for token in tokens.values())
        body = {"inputs": "a", **of}
        assert running.http.post("/v1/classify", json=body, headers=infer).status_code == 200
        problem(running.http.put("/v1/erasures/Sports", json=of, headers=infer), 403, "wrong_scope")
        assert running.http.put("/v1/erasures/Sports", json=of, headers=admin).json()["model"] == service.name


def test_two_services_of_one_name_are_no_application(two_models: RunningServer) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        create_app(Settings(), [two_models.service, two_models.service])
