"""Probes, metrics, inspection of concepts and neurons, request ids, logs, and the OpenAPI document."""

import asyncio
import gzip
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.observability.logs import fields_of
from app.openapi import document
from range_store.storage.jobs import Jobs, JobStore
from tests.app.openapi import dialects_of
from tests.range_store.waiting import until
from tests.servers import LABELS, RunningServer, with_ranges
from workers.fitting.fit import FitResult

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
COMMITTED = Path(__file__).parents[2] / "openapi.json"
OPENAPI = json.loads(COMMITTED.read_text("utf-8"))


def test_readiness_follows_range_set_and_drain(
    start_server: Callable[..., RunningServer], fitted: FitResult, problem: Problem
) -> None:
    server = start_server()
    assert server.http.get("/livez").json() == {"status": "alive"}
    unready = server.http.get("/readyz")
    assert problem(unready, 503, "not_ready")["checks"]["range_set"] is False
    assert unready.headers["retry-after"] == "1"
    with_ranges(server, fitted)
    assert server.http.get("/readyz").json()["checks"] == {
        "engine": True,
        "live_state": True,
        "range_set": True,
        "snapshot_fresh": True,
        "store": True,
    }
    server.service.engine.drain()
    problem(server.http.get("/readyz"), 503, "not_ready")
    problem(server.classify("a"), 503, "draining")
    assert server.http.get("/livez").status_code == 200


class Gate:
    """A context that is entered only after `released` is set."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self.reached.set()
        assert self.released.wait(60)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("stage", ["tokenizer", "model"])
def test_probes_and_toggles_are_answered_while_a_request_is_computed(
    server: RunningServer, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is held in one stage. It keeps the erasures under which it was admitted."""
    gate, encode = Gate(), server.model.tokens.encode

    def slow_encode(*args: Any, **kwargs: Any) -> Any:
        with gate:
            return encode(*args, **kwargs)

    if stage == "tokenizer":
        monkeypatch.setattr(server.model.tokens, "encode", slow_encode)
    else:
        monkeypatch.setattr(server.model.steered, "_lock", gate)
    admitted = server.http.get("/v1/erasures").json()["generation"]
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=60) as other:
        answer = pool.submit(server.classify, ["the keeper saved a penalty"] * 3)
        try:
            assert gate.reached.wait(60)
            for _ in range(5):
                for path in ("/livez", "/readyz", "/metrics", "/v1/concepts"):
                    assert other.get(path).status_code == 200
                assert other.put("/v1/erasures/Sports").status_code == 200
            assert not answer.done()
        finally:
            gate.released.set()
        assert answer.result().json()["erasure"]["generation"] == admitted


def test_metrics_parse_and_contain_no_user_text(server: RunningServer) -> None:
    server.classify("a very private sentence", erase=["Sports"])
    assert server.value("neuronlens_texts_total", {"source": "request"}) == 1
    server.http.get("/no/such/private/path")
    page = server.http.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    assert "private" not in page.text
    assert families["neuronlens_store_up"].samples[0].value == 1
    assert families["neuronlens_live_erasures"].samples[0].value == 0
    assert "request" in {sample.labels.get("source") for sample in families["neuronlens_texts"].samples}
    routes = {sample.labels.get("route") for sample in families["neuronlens_http_requests"].samples}
    assert routes >= {"/v1/classify", "unmatched"}
    assert all(name.startswith(("neuronlens_", "process_", "python_info")) for name in families)


def test_models_lists_the_loaded_model(server: RunningServer) -> None:
    (model,) = server.http.get("/v1/models").json()["models"]
    assert model["id"] == server.service.name
    assert model["labels"] == list(LABELS)
    assert (model["layers"], model["hidden_size"], model["dtype"], model["split"]) == (3, 32, "float32", True)
    assert Path(model["path"]).is_dir()


def test_models_are_listed_as_clients_of_openai_read_them(server: RunningServer, problem: Problem) -> None:
    """The shapes of `client.models.list()` and `client.models.retrieve(id)`."""
    listed = server.http.get("/v1/models").json()
    (model,) = listed["data"]
    assert (listed["object"], listed["models"]) == ("list", listed["data"])
    assert (model["object"], model["owned_by"]) == ("model", "neuronlens")
    assert model["created"] == int(server.service.started_at)
    assert server.http.get(f"/v1/models/{server.service.name}").json() == model
    for name in ("another", "an/other", f"{server.service.name}/"):
        assert problem(server.http.get(f"/v1/models/{name}"), 404, "unknown_model")["known"] == [model["id"]]


def test_concepts_lists_labels_and_other_concepts(server: RunningServer) -> None:
    concepts = {each["concept"]: each for each in server.http.get("/v1/concepts").json()["concepts"]}
    assert list(concepts) == [*LABELS, "Météo & co"]
    assert concepts["Météo & co"] == {
        "concept": "Météo & co",
        "texts": 4,
        "label": False,
        "erased": False,
        "enforced": False,
    }


def test_paging_through_ranges_returns_every_neuron_once(server: RunningServer, fitted: FitResult) -> None:
    seen: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": 9, "ranking": "selectivity", "tau": 2, "layer": -2}
    for _ in range(4):
        page = server.http.get("/v1/concepts/Sci%2FTech/ranges", params=params).json()
        assert (page["layer"], page["ranking"], page["tau"]) == (1, "selectivity", 2)
        seen += page["neurons"]
        params["cursor"] = page["next_cursor"]
    assert page["next_cursor"] is None
    assert sorted(each["neuron"] for each in seen) == list(range(32))
    assert [each["rank"] for each in seen] == list(range(32))
    layer = fitted.range_set.layers[1]
    row = fitted.range_set.concept_index("Sci/Tech")
    saliency = [each["saliency"] for each in seen]
    assert saliency == sorted(saliency, reverse=True)
    for each in seen:
        mean, std = layer.mean[row, each["neuron"]], layer.std[row, each["neuron"]]
        assert (each["low"], each["high"]) == pytest.approx((mean - 2 * std, mean + 2 * std))
        assert set(each["overlap"]) == {"World", "Sports", "Business", "Météo & co"}


def test_invalid_inspection_requests_are_rejected(server: RunningServer, problem: Problem) -> None:
    get = server.http.get
    problem(get("/v1/concepts/Weather/ranges"), 404, "unknown_concept")
    problem(get("/v1/concepts/Sports/ranges", params={"cursor": "?"}), 422, "invalid_cursor")
    problem(get("/v1/concepts/Sports/ranges", params={"limit": 0}), 422, "invalid")
    problem(get("/v1/concepts/Sports/ranges", params={"tau": "nan"}), 422, "invalid")
    problem(get("/v1/concepts/Sports/ranges", params={"layer": 0}), 422, "not_fitted")
    problem(get("/v1/concepts/Sports/ranges", params={"layer": 3}), 404, "unknown_neuron")
    problem(get("/v1/neurons/2/32"), 404, "unknown_neuron")
    problem(get("/v1/neurons/2/-1"), 404, "unknown_neuron")
    problem(get("/v1/neurons/9/0"), 404, "unknown_neuron")
    problem(get("/v1/neurons/0/0"), 422, "not_fitted")
    problem(get("/v1/range-sets/nothing"), 404, "unknown_range_set")
    problem(get("/v1/concepts/Sports/ranges", params={"taus": 2}), 422, "invalid")
    repeated = problem(get("/v1/concepts/Sports/ranges?tau=2&limit=5&tau=3"), 422, "invalid")
    assert repeated["errors"] == [{"loc": ["query", "tau"], "msg": "given more than once", "type": "repeated"}]
    problem(get("/v1/concepts", params={"model": "another"}), 404, "unknown_model")
    problem(get("/v1/nothing"), 404, "not_found")
    problem(get("/v1/classify"), 405, "method_not_allowed")


def test_rejected_method_lists_the_allowed_methods(server: RunningServer) -> None:
    for path, allowed in {
        "/v1/erasures": "GET, HEAD, PUT",
        "/v1/erasures/Sci/Tech": "PUT, DELETE",
        "/v1/range-sets/active": "PUT",
        "/v1/range-sets/0123": "GET, HEAD",
        "/v1/classify": "POST",
    }.items():
        rejected = server.http.patch(path)
        assert (rejected.status_code, rejected.headers["allow"]) == (405, allowed), path
    assert server.http.get("/v1/range-sets/active").status_code == 405, "'active' is not the id of a range set"


def test_neuron_has_statistics_of_every_concept(server: RunningServer, fitted: FitResult) -> None:
    neuron = server.http.get("/v1/neurons/-1/7").json()
    assert (neuron["layer"], neuron["neuron"], len(neuron["edges"])) == (2, 7, 65)
    inspect = fitted.inspect[2]
    for row, concept in enumerate(neuron["concepts"]):
        histogram = concept["histogram"]
        assert histogram["below"] + sum(histogram["counts"]) + histogram["above"] == concept["texts"]
        assert concept["minimum"] == inspect.minimum[row, 7]
        std = concept["std"]
        assert concept["skewness"] == pytest.approx(inspect.m3[row, 7] / std**3)
        assert concept["kurtosis"] >= 1
        assert set(concept["rank"]) == {"max", "probeless", "probeless_global", "selectivity"}


def test_overlap_is_symmetric_and_matches_jaccard(server: RunningServer) -> None:
    overlap = server.http.get("/v1/overlap", params={"top_fraction": 0.25}).json()
    share, jaccard = np.array(overlap["share"]), np.array(overlap["jaccard"])
    assert overlap["neurons"] == 8
    assert overlap["chance"] == 0.25
    assert np.array_equal(np.diag(share), np.ones(5))
    assert np.array_equal(share, share.T)
    assert np.allclose(jaccard, share / (2 - share))
    assert np.array_equal(np.array(server.http.get("/v1/overlap?top_fraction=1").json()["share"]), np.ones((5, 5)))


def test_request_id_is_echoed_or_generated(server: RunningServer) -> None:
    assert server.http.get("/livez", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    generated = server.http.get("/livez", headers={"X-Request-ID": "not valid!"}).headers["x-request-id"]
    assert len(generated) == 32
    error = server.http.get("/nothing", headers={"X-Request-ID": "abc-2"})
    assert error.json()["request_id"] == error.headers["x-request-id"] == "abc-2"


def test_host_other_than_loopback_is_rejected(server: RunningServer, problem: Problem) -> None:
    problem(server.http.get("/v1/concepts", headers={"Host": "evil.example"}), 421, "wrong_host")
    assert server.http.get("/livez", headers={"Host": "localhost:9"}).status_code == 200
    assert server.http.get("/livez", headers={"Host": "[::1]:9"}).status_code == 200


def test_internal_error_is_a_problem_without_traceback_or_text(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError(" ".join(args[0]))

    monkeypatch.setattr(server.service.engine, "classify", broken)
    response = server.classify("a secret text")
    problem(response, 500, "internal")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert server.http.get("/livez").status_code == 200, "the connection stays open"
    id_ = response.headers["x-request-id"]
    (record,) = [each for each in caplog.records if each.levelname == "ERROR" and id_ in each.getMessage()]
    logged = record.getMessage()
    assert "ZeroDivisionError" in logged
    assert any("in broken" in frame for frame in fields_of(record)["exception"]["frames"])
    assert "secret" not in caplog.text + str(fields_of(record))


def test_user_text_is_never_logged(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        server.classify("a private confession", erase=["Sports"])
        server.classify({"text": "a private confession"})
        server.classify(["a private confession"], erase=["Weather"])
    assert "confession" not in caplog.text


def test_docs_page_loads_nothing_from_other_hosts(server: RunningServer) -> None:
    page = server.http.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) >= 2
    for source in sources:
        assert source.startswith("/")
        assert server.http.get(source).status_code == 200
    assert server.http.get("/openapi.json").json()["info"]["title"] == "NeuronLens"


def test_committed_openapi_document_is_current() -> None:
    assert COMMITTED.read_text("utf-8") == document(), "run `make openapi`"


def test_every_route_documents_its_errors() -> None:
    for path, methods in OPENAPI["paths"].items():
        for method, operation in methods.items():
            assert {"413", "421", "500"} <= operation["responses"].keys()
            assert "default" not in operation["responses"], "a default response would document every status"
            for status, response in operation["responses"].items():
                assert "X-Request-ID" in response["headers"]
                if int(status) >= 400:
                    plain = bool(dialects_of(method.upper(), path))
                    media_types = {"application/json"} if plain else {"application/problem+json"}
                    if plain and status in ("408", "431"):
                        media_types.add("application/problem+json")
                    assert set(response["content"]) == media_types, (path, method, status)
                if status in ("429", "503"):
                    assert response["headers"]["Retry-After"]["required"] == (status == "429")


def test_replies_have_exactly_the_documented_fields(server: RunningServer) -> None:
    for path, template in {
        "/livez": "/livez",
        "/readyz": "/readyz",
        "/v1/models": "/v1/models",
        "/v1/erasures": "/v1/erasures",
        "/v1/range-sets": "/v1/range-sets",
        "/v1/concepts": "/v1/concepts",
        "/v1/concepts/Sports/ranges": "/v1/concepts/{concept}/ranges",
        "/v1/neurons/-1/0": "/v1/neurons/{layer}/{neuron}",
        "/v1/overlap": "/v1/overlap",
    }.items():
        schema = OPENAPI["paths"][template]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        component = OPENAPI["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(server.http.get(path).json()) == set(component["properties"]), path


def test_every_example_of_a_body_is_answered(server: RunningServer) -> None:
    schemas = OPENAPI["components"]["schemas"]
    instead = {"/v1/range-sets/active": 404, "/v1/fits": 403}  # it has no such range set, and takes no fits
    places = {"{concept}": "Sports", "{model}": server.service.name, "{model_version}": "1"}
    for template, operations in OPENAPI["paths"].items():
        for method, operation in operations.items():
            if "requestBody" in operation:
                (name,) = re.findall(r"#/components/schemas/(\w+)", str(operation["requestBody"]))
                path = re.sub(r"{\w+}", lambda found: places[found[0]], template)
                for example in schemas[name]["examples"]:
                    reply = server.http.request(method, path, json=example)
                    assert reply.status_code == instead.get(path, 200), (path, reply.text)


def test_a_packed_body_is_answered_as_the_plain_one(server: RunningServer, problem: Problem) -> None:
    body = json.dumps({"inputs": ["a goal", "a market"], "erase": ["Sports"]}).encode()
    headers = {"Content-Type": "application/json"}
    plain = server.http.post("/v1/classify", content=body, headers=headers)

    def packed(content: bytes, coding: str = "gzip") -> httpx.Response:
        encoded = headers | {"Content-Encoding": coding}
        return server.http.post("/v1/classify", content=content, headers=encoded)

    assert packed(gzip.compress(body)).json()["results"] == plain.json()["results"]
    most = server.service.settings.max_body_bytes
    problem(packed(gzip.compress(b" " * (most + 1))), 413, "body_too_large")
    problem(packed(body), 400, "malformed")
    problem(packed(body, "br"), 415, "unsupported_media_type")
    assert server.value("neuronlens_body_bytes") == 0


def test_large_replies_are_packed(server: RunningServer) -> None:
    for path in ("/openapi.json", "/metrics"):
        packed = server.http.get(path)
        assert packed.headers["content-encoding"] == "gzip", path
        plain = server.http.get(path, headers={"Accept-Encoding": "gzip;q=0, identity"})
        assert "content-encoding" not in plain.headers
        assert len(plain.content) > 3 * int(packed.headers["content-length"])
    assert "content-encoding" not in server.http.get("/livez").headers


def test_head_answers_as_get_without_a_body(server: RunningServer) -> None:
    changing = {"date", "x-request-id"}
    for path in (
        "/livez",
        "/readyz",
        "/openapi.json",
        "/v1/erasures",
        "/v1/nothing",
        "/health",
        "/v2/health/ready",
        "/",
    ):
        with_body, head = server.http.get(path), server.http.head(path)
        assert head.status_code == with_body.status_code, path
        assert head.content == b""
        for name in with_body.headers.keys() - changing:
            assert path == "/readyz" or head.headers[name] == with_body.headers[name], (path, name)
    assert server.http.head("/metrics").headers["content-type"].startswith("text/plain")
    assert server.http.head("/v1/events").headers["content-type"].startswith("text/event-stream")
    until(lambda: server.value("neuronlens_event_streams") == 0)
    labels = {"method": "HEAD", "route": "/livez", "status": "200"}
    until(lambda: server.value("neuronlens_http_requests_total", labels) == 1)
    assert server.http.head("/v1/classify").headers["allow"] == "POST"


def test_jobs_are_never_read_on_the_event_loop(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    read = JobStore.read
    reads = 0

    def read_off_the_loop(jobs: JobStore) -> Jobs:
        nonlocal reads
        reads += 1
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return read(jobs)

    monkeypatch.setattr(JobStore, "read", read_off_the_loop)
    for path in ("/v1/jobs", "/v1/jobs/0123456789abcdef"):
        assert server.http.get(path).status_code in (200, 404)
    assert reads >= 2
