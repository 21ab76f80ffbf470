"""Properties of every route that speaks the protocol of another server: steering, limits, keys, errors."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import httpx
import jsonschema
import pytest

from app.routes.dropin.steering import LONGEST_HEADER, erased_header
from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from tests.e2e.dropin.protocols import PROTOCOLS, TEI_ERROR, Protocol, Scores, refused
from tests.range_store.waiting import until
from tests.servers import KeyedServer, RunningServer, with_ranges
from tests.workers.texts import labelled_texts
from workers.fitting.fit import FitResult

TEXTS = [text for text, _ in labelled_texts(6, seed=6)]
EVERYTHING = {"concepts": ["Sports", "World"], "top_fraction": 1.0, "tau": 3.0}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return PROTOCOLS[request.param]


@pytest.fixture(scope="module")
def small_server(start_module_server: Callable[..., RunningServer], fitted: FitResult) -> RunningServer:
    """A server that takes two short texts at a time."""
    limits = {"max_texts": 2, "max_characters": 50, "max_body_bytes": 2000, "max_queue_texts": 2}
    return with_ranges(start_module_server(**limits), fitted)


def post(running: RunningServer, protocol: Protocol, body: Any, **options: Any) -> httpx.Response:
    return running.http.post(protocol.path(running.service.name), json=body, **options)


def scores(running: RunningServer, protocol: Protocol, body: Any) -> Scores:
    reply = post(running, protocol, body)
    assert reply.status_code == 200, reply.text
    return protocol.scores(reply.json())


def v1_scores(running: RunningServer, **fields: Any) -> list[Any]:
    """The scores of /v1/classify for the same texts, to compare with: batches differ in the last bits."""
    results = running.classify(TEXTS, **fields).raise_for_status().json()["results"]
    found = [{each["label"]: each["score"] for each in result["scores"]} for result in results]
    return [pytest.approx(each, abs=1e-4) for each in found]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_scores_equal_those_of_v1_and_requests_are_counted(server: RunningServer, protocol: Protocol) -> None:
    reply = post(server, protocol, protocol.request(TEXTS))
    assert protocol.scores(reply.json()) == v1_scores(server)
    assert reply.headers["x-neuronlens-source"] == "none"
    assert "x-neuronlens-erased" not in reply.headers
    counted = {"method": "POST", "route": protocol.path("{model}"), "status": "200"}
    value = server.value
    until(lambda: value("neuronlens_http_requests_total", counted) == 1)


@pytest.mark.parametrize("erase", [EVERYTHING, ["Sports"], [{"concept": "Météo & co", "tau": 1}, "Sci/Tech"]])
def test_erasures_of_the_request_are_applied(server: RunningServer, protocol: Protocol, erase: Any) -> None:
    body = protocol.request(TEXTS)
    reply = post(server, protocol, protocol.with_erase(body, erase))
    found, expected = protocol.scores(reply.json()), server.classify(TEXTS, erase=erase).json()["erasure"]
    assert found == v1_scores(server, erase=erase)
    assert found != v1_scores(server), "nothing was erased"
    assert [unquote(name) for name in reply.headers["x-neuronlens-erased"].split(",")] == expected["concepts"]
    assert reply.headers["x-neuronlens-generation"] == expected["generation"]


def test_live_erasures_are_applied_unless_the_request_names_none(server: RunningServer, protocol: Protocol) -> None:
    bare = v1_scores(server)
    server.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0)))
    server.service.mirror.refresh()
    reply = post(server, protocol, protocol.request(TEXTS))
    assert (reply.headers["x-neuronlens-source"], reply.headers["x-neuronlens-erased"]) == ("live", "Sports")
    assert protocol.scores(reply.json()) == v1_scores(server)
    assert protocol.scores(reply.json()) != bare
    spared = post(server, protocol, protocol.with_erase(protocol.request(TEXTS), []))
    assert "x-neuronlens-erased" not in spared.headers
    assert protocol.scores(spared.json()) == bare


def test_enforced_erasures_are_applied_to_every_request(server: RunningServer, protocol: Protocol) -> None:
    bare = v1_scores(server)
    server.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Météo & co", tau=1), enforced=True))
    server.service.mirror.refresh()
    for erase in ([], ["World"]):
        reply = post(server, protocol, protocol.with_erase(protocol.request(TEXTS), erase))
        erased = [unquote(name) for name in reply.headers["x-neuronlens-erased"].split(",")]
        assert erased == ["Météo & co", *erase]
        assert protocol.scores(reply.json()) == v1_scores(server, erase=erase)
        assert protocol.scores(reply.json()) != bare


def test_no_request_raises_the_score_of_an_enforced_concept(server: RunningServer, protocol: Protocol) -> None:
    enforced = LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0), enforced=True)
    server.service.store.set_erasure(enforced)
    server.service.mirror.refresh()
    body = protocol.request(TEXTS)
    bounds = scores(server, protocol, protocol.with_erase(body, []))
    others = {"concepts": ["World", "Business", "Sci/Tech"], "method": "neuron", "top_fraction": 0.6}
    found = scores(server, protocol, protocol.with_erase(body, others))
    assert found != bounds
    for each, bound in zip(found, bounds, strict=True):
        assert each["Sports"] <= bound["Sports"] + 1e-4
    below = [{"concept": "World", "method": "neuron", "top_fraction": 0.6, "layer": -2}]
    message = protocol.error(refused(post(server, protocol, protocol.with_erase(body, below)), 403, "enforced"))
    assert "'World' at block" in message


def test_invalid_erasures_are_rejected(server: RunningServer, protocol: Protocol) -> None:
    body = protocol.request(TEXTS)
    reply = post(server, protocol, protocol.with_erase(body, ["Weather"]))
    assert "'Weather'" in protocol.error(refused(reply, 404, "unknown_concept"))
    for erase in ({"concepts": ["Sports"], "tau": -1}, 5, {"concept": "Sports"}):
        reply = post(server, protocol, protocol.with_erase(body, erase))
        assert protocol.error(refused(reply, protocol.invalid, "invalid"))
    reply = post(server, protocol, protocol.with_erase(body, ["Sports", "Sports"]))
    assert protocol.error(refused(reply, protocol.invalid, "invalid_erasure"))


def test_unknown_fields_are_ignored(server: RunningServer, protocol: Protocol) -> None:
    body = {**protocol.request(TEXTS), "no such field": {"a": [1]}, "options": {"wait_for_model": True}}
    assert post(server, protocol, body, params={"whatever": "x"}).status_code == 200


def test_requests_above_a_limit_are_rejected(small_server: RunningServer, protocol: Protocol) -> None:
    assert post(small_server, protocol, protocol.request(["a", "b"])).status_code == 200
    for texts, code in (
        (["a"] * 3, "too_many_texts"),
        (["a" * 51], "text_too_large"),
        (["a" * 2000], "body_too_large"),
    ):
        reply = post(small_server, protocol, protocol.request(texts))
        assert protocol.error(refused(reply, 413, code))


def test_malformed_json_is_rejected(server: RunningServer, protocol: Protocol) -> None:
    path = protocol.path(server.service.name)
    assert protocol.error(refused(server.http.post(path, content=b"{", headers=JSON), 400, "malformed"))
    undeclared = server.http.post(path, content=b"{}")
    if protocol is PROTOCOLS["v2"]:  # its clients send no Content-Type
        assert protocol.error(refused(undeclared, 400, "invalid"))
    else:
        assert protocol.error(refused(undeclared, 415, "unsupported_media_type"))
    assert protocol.error(refused(server.http.post(path, json=[]), protocol.invalid, "invalid"))


def test_lone_surrogates_are_read_as_question_marks(server: RunningServer, protocol: Protocol) -> None:
    """A lone surrogate is legal in JSON and is not Unicode text: no tokenizer accepts it."""
    surrogates = ["half \ud800 of one", "\udc00", "the wrong way \udc00\ud800 round"]
    replaced = ["half ? of one", "?", "the wrong way ?? round"]
    path = protocol.path(server.service.name)
    reply = server.http.post(path, content=json.dumps(protocol.request(surrogates)), headers=JSON)
    assert reply.status_code == 200, reply.text
    assert protocol.scores(reply.json()) == scores(server, protocol, protocol.request(replaced))
    assert "surrogate" not in reply.text


def test_a_missed_deadline_is_reported(server: RunningServer, protocol: Protocol) -> None:
    late = post(server, protocol, protocol.request(TEXTS), headers={"X-Request-Timeout": "1e-9"})
    assert protocol.error(refused(late, 504, "deadline_exceeded"))


@pytest.mark.local
def test_a_full_queue_is_reported(small_server: RunningServer, protocol: Protocol) -> None:
    service, value = small_server.service, small_server.value

    def counted() -> tuple[float | None, float | None]:
        route = {"method": "POST", "route": protocol.path("{model}"), "status": "429"}
        return (
            value("neuronlens_rejections_total", {"reason": "queue_full"}),
            value("neuronlens_http_requests_total", route),
        )

    def classify() -> httpx.Response:
        return post(small_server, protocol, protocol.request(["a", "b"]))

    before = counted()
    with ThreadPoolExecutor(2) as pool:
        with small_server.model.steered._lock:  # the model answers nothing while the test holds it
            accepted = [pool.submit(classify)]
            until(lambda: service.engine._scheduler.running)
            accepted.append(pool.submit(classify))
            until(lambda: value("neuronlens_queue_texts") == 2)
            rejected = classify()
        assert [each.result().status_code for each in accepted] == [200, 200]
    assert protocol.error(refused(rejected, 429, "queue_full"))
    assert int(rejected.headers["retry-after"]) >= 1
    until(lambda: counted() == ((before[0] or 0) + 1, (before[1] or 0) + 1))  # a request is counted after its reply


def test_a_draining_server_rejects_every_protocol(fresh_server: RunningServer) -> None:
    fresh_server.service.engine.drain()
    for name, protocol in PROTOCOLS.items():
        body = refused(post(fresh_server, protocol, protocol.request(TEXTS)), 503, "draining")
        assert protocol.error(body)
        if name == "tei":
            assert body["error_type"] == "Unhealthy"


def test_classifying_requires_the_scope_infer(keyed_server: KeyedServer, protocol: Protocol) -> None:
    running, tokens = keyed_server
    body = protocol.request(TEXTS)
    assert protocol.error(refused(post(running, protocol, body), 401, "no_key"))
    assert protocol.error(refused(post(running, protocol, body, headers=bearer("nl_wrong")), 401, "bad_key"))
    assert protocol.error(refused(post(running, protocol, body, headers=bearer(tokens["read"])), 403, "wrong_scope"))
    assert post(running, protocol, body, headers=bearer(tokens["infer"])).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "scope", "wrong"),
    [("GET", "/info", None, "read", "infer"), ("POST", "/tokenize", {"inputs": "a"}, "infer", "read")],
)
def test_other_routes_require_their_scope(
    keyed_server: KeyedServer, method: str, path: str, body: Any, scope: str, wrong: str
) -> None:
    running, tokens = keyed_server
    jsonschema.validate(refused(running.http.request(method, path, json=body), 401, "no_key"), TEI_ERROR)
    for given, status in ((wrong, 403), (scope, 200)):
        reply = running.http.request(method, path, json=body, headers=bearer(tokens[given]))
        assert reply.status_code == status


def test_the_header_of_erased_concepts_takes_any_name_and_is_bounded() -> None:
    names = ["Sci/Tech", "a,b", "é\r\nX: y", "*", "日本" * 10]
    assert [unquote(name) for name in erased_header(names).split(",")] == names
    many = erased_header([f"concept {n} é" for n in range(1000)])
    assert len(many) <= LONGEST_HEADER + 2
    assert many.endswith(",*")
    assert many.isascii()
    assert erased_header(["é" * 500]) == "*"
