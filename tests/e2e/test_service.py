"""Probes, metrics, inspection, and the edges of HTTP itself."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.logs import fields_of
from app.openapi import document
from app.routes.dropin import dialect_of
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import LABELS, RunningServer
from tests.workers.checkpoints import save_tiny
from workers.fitting.fit import Fitted
from workers.models.loading import load_model

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
ROOT = Path(__file__).parents[2]


def test_readiness_follows_what_is_needed_to_answer(
    start_server: Callable[..., RunningServer], fitted: Fitted, problem: Problem
) -> None:
    running = start_server()
    assert running.http.get("/livez").json() == {"status": "alive"}
    assert problem(running.http.get("/readyz"), 503, "not_ready")["checks"]["range_set"] is False
    store = running.service.store
    store.activate(store.publish(fitted.range_set, fitted.inspect))
    running.service.mirror.refresh()
    assert running.http.get("/readyz").json()["checks"] == {
        "engine": True,
        "live_state": True,
        "range_set": True,
        "snapshot_fresh": True,
        "store": True,
    }
    running.service.engine.drain()
    problem(running.http.get("/readyz"), 503, "not_ready")
    problem(running.classify("a"), 503, "draining")
    assert running.http.get("/livez").status_code == 200


def test_a_slow_forward_pass_delays_no_probe_and_no_toggle(server: RunningServer) -> None:
    """Promise 9: the model is held for as long as the test likes, and everything else answers meanwhile."""
    answers: list[httpx.Response] = []
    with server.model.steered._lock:
        waiting = threading.Thread(target=lambda: answers.append(server.classify("the keeper saved a penalty")))
        waiting.start()
        with httpx.Client(base_url=server.url, timeout=30) as other:
            for _ in range(20):
                assert other.get("/livez").status_code == 200
                assert other.get("/metrics").status_code == 200
            assert other.put("/v1/erasures/Sports").status_code == 200
            assert other.get("/readyz").status_code == 200
        assert not answers
    waiting.join()
    assert answers[0].status_code == 200


def test_while_a_large_request_is_computed_everything_else_goes_on(
    start_server: Callable[..., RunningServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Promise 9 with real work: seconds of forward passes; and promise 4: its plan is the one of its admission."""
    path = save_tiny("bert", tmp_path_factory.mktemp("large") / "large", n_layers=6, hidden=256)
    running = start_server(load_model(str(path), device="cpu"), request_timeout=250.0)
    identity = running.service.model.identity
    ranges = random_range_set(
        1, LABELS, hidden=identity.hidden_size, n_layers=identity.n_layers, fingerprint=identity.fingerprint
    )
    running.service.store.activate(running.service.store.publish(*ranges))
    running.service.mirror.refresh()
    admitted = running.http.get("/v1/erasures").json()["generation"]
    answers: list[httpx.Response] = []
    body = {"inputs": ["goal and more " * 40] * 500}
    large = threading.Thread(target=lambda: answers.append(running.http.post("/v1/classify", json=body, timeout=250)))
    rounds = 0
    with httpx.Client(base_url=running.url, timeout=60) as other:
        large.start()
        until(lambda: running.value("neuronlens_queue_texts") != 0)
        while large.is_alive():
            for path_ in ("/livez", "/readyz", "/metrics", "/v1/concepts"):
                assert other.get(path_).status_code == 200
            assert other.put("/v1/erasures/Sports").status_code == 200
            rounds += 1
    large.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["erasure"]["generation"] == admitted
    assert rounds >= 5


def test_metrics_are_prometheus_and_hold_no_text(server: RunningServer) -> None:
    server.classify("a very private sentence", erase=["Sports"])
    server.http.get("/no/such/private/path")
    page = server.http.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    assert "private" not in page.text
    assert families["neuronlens_store_up"].samples[0].value == 1
    assert families["neuronlens_live_erasures"].samples[0].value == 0
    texts = {
        sample.labels["source"]: sample.value
        for sample in families["neuronlens_texts"].samples
        if "source" in sample.labels and sample.name.endswith("_total")
    }
    assert texts["request"] == 1
    routes = {sample.labels.get("route") for sample in families["neuronlens_http_requests"].samples}
    assert routes >= {"/v1/classify", "unmatched"}
    assert all(name.startswith(("neuronlens_", "process_", "python_info")) for name in families)


def test_models_say_what_is_loaded(server: RunningServer) -> None:
    (model,) = server.http.get("/v1/models").json()["models"]
    assert model["id"] == server.service.name
    assert model["labels"] == list(LABELS)
    assert (model["layers"], model["hidden_size"], model["dtype"], model["split"]) == (3, 32, "float32", True)
    assert Path(model["path"]).is_dir()


def test_concepts_and_which_are_labels(server: RunningServer) -> None:
    concepts = {each["concept"]: each for each in server.http.get("/v1/concepts").json()["concepts"]}
    assert list(concepts) == [*LABELS, "Météo & co"]
    assert concepts["Météo & co"] == {
        "concept": "Météo & co",
        "texts": 4,
        "label": False,
        "erased": False,
        "enforced": False,
    }


def test_ranges_page_through_every_neuron_once(server: RunningServer, fitted: Fitted) -> None:
    seen: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        params = {"limit": 9, "ranking": "selectivity", "tau": 2, "layer": -2} | ({"cursor": cursor} if cursor else {})
        page = server.http.get("/v1/concepts/Sci%2FTech/ranges", params=params).json()
        assert (page["layer"], page["ranking"], page["tau"]) == (1, "selectivity", 2)
        seen += page["neurons"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(each["neuron"] for each in seen) == list(range(32))
    assert [each["rank"] for each in seen] == list(range(32))
    start_server = fitted.range_set.layers[1]
    row = fitted.range_set.concept_index("Sci/Tech")
    saliency = [each["saliency"] for each in seen]
    assert saliency == sorted(saliency, reverse=True)
    for each in seen:
        mean, std = start_server.mean[row, each["neuron"]], start_server.std[row, each["neuron"]]
        assert (each["low"], each["high"]) == pytest.approx((mean - 2 * std, mean + 2 * std))
        assert set(each["overlap"]) == {"World", "Sports", "Business", "Météo & co"}


def test_pages_and_neurons_that_do_not_exist(server: RunningServer, problem: Problem) -> None:
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
    twice = problem(get("/v1/concepts/Sports/ranges?tau=2&limit=5&tau=3"), 422, "invalid")
    assert twice["errors"] == [{"loc": ["query", "tau"], "msg": "given more than once", "type": "repeated"}]
    problem(get("/v1/concepts", params={"model": "another"}), 404, "unknown_model")
    problem(get("/v1/nothing"), 404, "not_found")
    problem(get("/v1/classify"), 405, "method_not_allowed")


def test_a_refused_method_is_told_all_that_the_path_takes(server: RunningServer) -> None:
    for path, allowed in {
        "/v1/erasures": "GET, PUT",
        "/v1/erasures/Sci/Tech": "PUT, DELETE",
        "/v1/range-sets/active": "PUT",
        "/v1/range-sets/0123": "GET",
        "/v1/classify": "POST",
    }.items():
        refused = server.http.patch(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed), path
    assert server.http.get("/v1/range-sets/active").status_code == 405, "active is a path of its own, not an id"


def test_a_server_that_is_not_ready_says_when_to_ask_again(start_server: Callable[..., RunningServer]) -> None:
    unready = start_server().http.get("/readyz")
    assert (unready.status_code, unready.headers["retry-after"]) == (503, "1")


def test_a_neuron_shows_every_concept(server: RunningServer, fitted: Fitted) -> None:
    shown = server.http.get("/v1/neurons/-1/7").json()
    assert (shown["layer"], shown["neuron"], len(shown["edges"])) == (2, 7, 65)
    inspect = fitted.inspect[2]
    for row, of_concept in enumerate(shown["concepts"]):
        histogram = of_concept["histogram"]
        assert histogram["below"] + sum(histogram["counts"]) + histogram["above"] == of_concept["texts"]
        assert of_concept["minimum"] == inspect.minimum[row, 7]
        std = of_concept["std"]
        assert of_concept["skewness"] == pytest.approx(inspect.m3[row, 7] / std**3)
        assert of_concept["kurtosis"] >= 1
        assert set(of_concept["rank"]) == {"max", "probeless", "probeless_global", "selectivity"}


def test_overlap_of_the_salient_sets(server: RunningServer) -> None:
    shown = server.http.get("/v1/overlap", params={"top_fraction": 0.25}).json()
    share, jaccard = np.array(shown["share"]), np.array(shown["jaccard"])
    assert shown["neurons"] == 8
    assert shown["chance"] == 0.25
    assert np.array_equal(np.diag(share), np.ones(5))
    assert np.array_equal(share, share.T)
    assert np.allclose(jaccard, share / (2 - share))
    assert np.array_equal(np.array(server.http.get("/v1/overlap?top_fraction=1").json()["share"]), np.ones((5, 5)))


def test_request_ids_are_echoed_or_made(server: RunningServer) -> None:
    assert server.http.get("/livez", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = server.http.get("/livez", headers={"X-Request-ID": "not sane!"}).headers["x-request-id"]
    assert len(made) == 32
    missing = server.http.get("/nothing", headers={"X-Request-ID": "abc-2"})
    assert missing.json()["request_id"] == missing.headers["x-request-id"] == "abc-2"


def test_only_loopback_names_are_answered(server: RunningServer, problem: Problem) -> None:
    problem(server.http.get("/v1/concepts", headers={"Host": "evil.example"}), 421, "wrong_host")
    assert server.http.get("/livez", headers={"Host": "localhost:9"}).status_code == 200
    assert server.http.get("/livez", headers={"Host": "[::1]:9"}).status_code == 200


def test_a_fault_is_a_problem_without_a_traceback(
    server: RunningServer, problem: Problem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError(" ".join(args[0]))

    monkeypatch.setattr(server.service.engine, "classify", broken)
    response = server.classify("a secret text")
    problem(response, 500, "internal")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert server.http.get("/livez").status_code == 200, "the connection survives"
    id_ = response.headers["x-request-id"]
    (record,) = [each for each in caplog.records if each.levelname == "ERROR" and id_ in each.getMessage()]
    logged = record.getMessage()
    assert "ZeroDivisionError" in logged
    assert any("in broken" in frame for frame in fields_of(record)["exception"]["frames"])
    assert "secret" not in caplog.text + str(fields_of(record))


def test_no_text_of_a_user_reaches_the_log(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        server.classify("a confession nobody must read", erase=["Sports"])
        server.classify({"text": "a confession nobody must read"})
        server.classify(["a confession nobody must read"], erase=["Weather"])
    assert "confession" not in caplog.text


def test_docs_are_served_from_here_alone(server: RunningServer) -> None:
    page = server.http.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) >= 2
    for source in sources:
        assert source.startswith("/"), "no request to another host"
        assert server.http.get(source).status_code == 200
    assert server.http.get("/openapi.json").json()["info"]["title"] == "NeuronLens"


def test_the_committed_openapi_is_current() -> None:
    assert (ROOT / "openapi.json").read_text("utf-8") == document(), "run `make openapi`"


def test_every_route_documents_its_errors_as_problems() -> None:
    api = json.loads(document())
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert {"413", "421", "500"} <= operation["responses"].keys()
            assert "default" not in operation["responses"], "it would make every status a documented one"
            for status, response in operation["responses"].items():
                assert "X-Request-ID" in response["headers"]
                if int(status) >= 400:
                    plain = dialect_of({"method": method.upper(), "path": path}) is not None
                    media_types = {"application/json"} if plain else {"application/problem+json"}
                    if plain and status in ("408", "431"):
                        media_types.add("application/problem+json")
                    assert set(response["content"]) == media_types, (path, method, status)
                if status in ("429", "503"):
                    assert response["headers"]["Retry-After"]["required"]


def test_what_the_server_answers_is_what_openapi_says(server: RunningServer) -> None:
    """Every reply of a success has exactly the fields of its schema."""
    api = json.loads(document())
    for path, shown in {
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
        schema = api["paths"][shown]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        named = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(server.http.get(path).json()) == set(named["properties"]), path
