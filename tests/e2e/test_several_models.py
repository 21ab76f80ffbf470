"""Several models in one server: each is selected by its name and has its own live erasures."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.main import create_app
from app.serving.service import Service
from app.settings import Settings
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.api_keys import ApiKeyStore
from tests.range_store.waiting import until
from tests.servers import RunningServer, random_ranges, with_ranges
from workers.models.loading import LoadedModel

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXTS = ["the keeper saved a penalty", "a cat sat there", "rain in Oslo"]


@pytest.fixture(scope="module")
def shared_server_of_two_models(
    start_module_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel
) -> RunningServer:
    ranges = random_ranges(model.identity, 0), random_ranges(other.identity, 1)
    return with_ranges(start_module_server(model, other), *ranges)


@pytest.fixture
def two_models(shared_server_of_two_models: RunningServer) -> RunningServer:
    """One server for all tests of this file, with random ranges active for both models and nothing erased."""
    shared_server_of_two_models.reset()
    return shared_server_of_two_models


def classify(server: RunningServer, model: str) -> dict[str, Any]:
    reply = server.classify(TEXTS, model=model)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    assert answer.pop("model") == model
    return answer


def test_erasing_on_one_model_leaves_the_other_unchanged(two_models: RunningServer) -> None:
    http = two_models.http
    one, other = (service.name for service in two_models.services)

    def audit(name: str) -> set[str]:
        """Return the ids of the entries about Sports."""
        entries = http.get("/v1/audit", params={"model": name}).json()["entries"]
        return {entry["id"] for entry in entries if "Sports" in entry["concepts"]}

    audited = {name: audit(name) for name in (one, other)}
    before = {name: classify(two_models, name) for name in (one, other)}
    generation = http.get("/v1/erasures").headers["etag"]

    everything = {"top_fraction": 1.0, "method": "neuron", "model": other}
    changed = http.put("/v1/erasures/Sports", json=everything)
    assert (changed.status_code, changed.json()["model"]) == (200, other)
    assert classify(two_models, one) == before[one]
    assert http.get("/v1/erasures", params={"model": one}).headers["etag"] == generation
    after = classify(two_models, other)
    assert after["erasure"]["concepts"] == ["Sports"]
    assert after["results"] != before[other]["results"]

    # the concept of the same name on the first model, which is the default
    assert http.put("/v1/erasures/Sports", json={"top_fraction": 1.0}).json()["model"] == one
    assert classify(two_models, other) == after
    http.delete("/v1/erasures/Sports", params={"model": other}).raise_for_status()
    assert classify(two_models, other)["results"] == before[other]["results"]
    assert classify(two_models, one)["erasure"]["concepts"] == ["Sports"]
    assert [len(audit(name) - audited[name]) for name in (one, other)] == [1, 2]


def test_every_read_route_answers_for_the_named_model(two_models: RunningServer) -> None:
    for service in two_models.services:
        of = {"model": service.name}
        listed = two_models.http.get("/v1/concepts", params=of).json()
        assert [each["concept"] for each in listed["concepts"]] == list(service.model.identity.labels)
        assert two_models.http.get("/v1/capabilities", params=of).json()["model"] == service.name
        (published,) = two_models.http.get("/v1/range-sets", params=of).json()["range_sets"]
        assert published["provenance"]["model"]["fingerprint"] == service.model.identity.fingerprint
        for path in ("/v1/concepts/Sports/ranges", "/v1/neurons/-1/0", "/v1/overlap", "/v1/jobs"):
            assert two_models.http.get(path, params=of).json()["model"] == service.name
        activations = two_models.http.post("/v1/activations", json={"inputs": TEXTS, "neurons": [0], **of}).json()
        assert (activations["model"], activations["layer"]) == (service.name, service.model.identity.n_layers - 1)
        with two_models.http.stream("GET", "/v1/events", params=of) as stream:
            data = next(line for line in stream.iter_lines() if line.startswith("data:"))
            assert json.loads(data.removeprefix("data:"))["model"] == service.name
    assert [each["id"] for each in two_models.http.get("/v1/models").json()["models"]] == [
        each.name for each in two_models.services
    ]


def test_other_protocols_answer_for_the_named_model(two_models: RunningServer) -> None:
    for service in two_models.services:
        of, labels = {"model": service.name}, set(service.model.identity.labels)
        expected = [result["label"] for result in classify(two_models, service.name)["results"]]
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
OPENAPI = json.loads((Path(__file__).parents[2] / "openapi.json").read_text("utf-8"))


def operations_with_a_model() -> Iterator[tuple[str, str, bool, bool]]:
    """Yield the operations that can name a model: method, path, whether the query can, and whether the body can."""

    def fields(schema: Any) -> set[str]:
        if "$ref" in schema:
            return fields(OPENAPI["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        parts = [fields(each) for each in (*schema.get("anyOf", ()), *schema.get("allOf", ()))]
        return set(schema.get("properties", {})).union(*parts)

    for path, methods in OPENAPI["paths"].items():
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


def test_unknown_model_is_rejected_on_every_route(two_models: RunningServer, problem: Problem) -> None:
    """The routes are those of the OpenAPI document, so that a new route is tested too."""
    found = list(operations_with_a_model())
    assert len(found) > 30
    before = [service.store.live_state() for service in two_models.services]
    names = [service.name for service in two_models.services]
    for method, path, in_query, in_body in found:
        url = re.sub(r"{(\w+)}", lambda part: {"model": UNKNOWN, "model_version": "1"}.get(part[1], "0"), path)
        url = url.replace("/reports/0/0", "/reports/0/run.json")
        body: dict[str, Any] = {} if method in ("GET", "DELETE") else {"json": BODIES.get(path, INFER)}
        if "{model}" in path:
            replies = [two_models.http.request(method, url, **body)]
        else:
            replies = [two_models.http.request(method, url, params={"model": UNKNOWN}, **body)] if in_query else []
            if in_body:
                replies.append(two_models.http.request(method, url, json={**body["json"], "model": UNKNOWN}))
        assert replies
        for reply in replies:
            assert problem(reply, 404, "unknown_model")["known"] == names, (method, path)
    assert [service.store.live_state() for service in two_models.services] == before


def test_different_models_in_query_and_body_are_rejected(two_models: RunningServer, problem: Problem) -> None:
    one, other = (service.name for service in two_models.services)
    body = {"inputs": "a", "model": other}
    problem(two_models.http.post("/v1/classify", params={"model": one}, json=body), 422, "invalid")
    problem(two_models.http.put("/v1/erasures/Sports", params={"model": one}, json={"model": other}), 422, "invalid")
    same = two_models.http.post("/v1/classify", params={"model": other}, json=body)
    assert same.json()["model"] == other


def test_server_is_ready_when_all_models_are(
    start_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel
) -> None:
    server = start_server(model, other)
    one, two = server.services

    def activate(service: Service) -> None:
        service.store.activate(service.store.range_sets.publish(*random_ranges(service.model.identity, 1)))
        service.mirror.refresh()

    activate(one)
    assert server.http.get("/v2/health/ready").status_code == 503
    checks = server.http.get("/readyz").json()["checks"]
    assert (checks[f"{one.name}: range_set"], checks[f"{two.name}: range_set"]) == (True, False)
    statuses = [server.http.get(f"/v2/models/{each.name}/ready").status_code for each in (one, two)]
    assert statuses == [200, 503]
    assert [server.value("neuronlens_ready", {"model": each.name}) for each in (one, two)] == [1, 0]
    assert classify(server, one.name)["results"], "a model that is ready answers before the others are"
    activate(two)
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["generation"]) == (200, None)


def test_every_model_has_its_own_metrics(two_models: RunningServer) -> None:
    one, other = (service.name for service in two_models.services)
    classify(two_models, other)
    two_models.http.put("/v1/erasures/Cats", params={"model": other}).raise_for_status()

    def values(name: str, **labels: str) -> list[float | None]:
        return [two_models.value(name, {"model": model, **labels}) for model in (one, other)]

    assert values("neuronlens_live_erasures") == [0, 1]
    assert values("neuronlens_live_changes_total", change="on") == [0, 1]
    assert [tokens == 0 for tokens in values("neuronlens_tokens_total")] == [True, False]
    page = two_models.http.get("/metrics").text
    assert page.count("# TYPE neuronlens_queue_texts gauge\n") == 1, "models share a metric family"


def test_full_model_rejects_requests_that_can_only_be_for_it(
    start_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel, problem: Problem
) -> None:
    """The body is not read where the URL names the full model, or where all models are full."""
    server = start_server(model, other, max_queue_texts=1)
    one, two = server.services

    def rejected() -> list[float | None]:
        labels = {"reason": "queue_full"}
        return [server.value("neuronlens_rejections_total", {"model": each.name, **labels}) for each in (one, two)]

    def fill(service: Service) -> list[Future[httpx.Response]]:
        """Send one text that the model computes, and one that waits and fills the queue."""
        of = {"model": service.name}
        computed = server.value("neuronlens_queue_wait_seconds_count", of) or 0
        sent = [pool.submit(server.classify, "a", **of)]
        until(lambda: server.value("neuronlens_queue_wait_seconds_count", of) == computed + 1)
        sent.append(pool.submit(server.classify, "a", **of))
        until(lambda: server.value("neuronlens_queue_texts", of) == 1)
        return sent

    def send_malformed(path: str, **query: str) -> httpx.Response:
        return server.http.post(path, params=query, content=b"{", headers={"Content-Type": "application/json"})

    with ThreadPoolExecutor(4) as pool, ExitStack() as locks:
        locks.enter_context(other.steered._lock)
        sent = fill(two)
        for path in ("/predict", "/v1/classify", "/"):
            problem(send_malformed(path, model=two.name), 429, "queue_full")
            problem(send_malformed(path), 400, "malformed")
        problem(send_malformed(f"/v2/models/{two.name}/infer"), 429, "queue_full")
        problem(send_malformed(f"/v2/models/{two.name}/versions/1/infer"), 429, "queue_full")
        assert rejected() == [0, 5]
        problem(server.classify("a", model=two.name), 429, "queue_full")
        assert rejected() == [0, 6]
        assert server.classify("a", model=one.name).json()["model"] == one.name
        locks.enter_context(model.steered._lock)
        sent += fill(one)
        problem(send_malformed("/v1/classify"), 429, "queue_full")
        assert rejected() == [1, 6]
        locks.close()
        assert [each.result().status_code for each in sent] == [200] * 4


def test_api_keys_apply_to_all_models(
    own_redis: EmbeddedRedis,
    start_server: Callable[..., RunningServer],
    model: LoadedModel,
    other: LoadedModel,
    problem: Problem,
) -> None:
    tokens = [ApiKeyStore(own_redis).create(f"the-{scope}", [scope])[1] for scope in ("infer", "admin")]
    infer, admin = ({"Authorization": f"Bearer {token}"} for token in tokens)
    running = start_server(model, other, redis_url=own_redis.url)
    server = with_ranges(running, random_ranges(model.identity, 0), random_ranges(other.identity, 1))
    for service in server.services:
        of = {"model": service.name}
        problem(server.http.get("/v1/erasures", params=of), 401, "no_key")
        assert server.http.post("/v1/classify", json={"inputs": "a", **of}, headers=infer).status_code == 200
        problem(server.http.put("/v1/erasures/Sports", json=of, headers=infer), 403, "wrong_scope")
        assert server.http.put("/v1/erasures/Sports", json=of, headers=admin).json()["model"] == service.name


def test_two_models_of_one_name_are_rejected(two_models: RunningServer) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        create_app(Settings(), [two_models.service, two_models.service])
