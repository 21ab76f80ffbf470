"""What holds on every route that speaks as another server does: steering, limits, keys, errors."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from app.routes.dropin.steering import LONGEST_HEADER, erased_header
from range_store.api_keys import KeyStore
from range_store.erasure import Erasure
from range_store.live import LiveErasure
from tests.e2e.dropin.protocols import PROTOCOLS, Protocol, refused
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from tests.workers.texts import labelled_texts
from workers.fitting.fit import Fitted

TEXTS = [text for text, _ in labelled_texts(6, seed=6)]
EVERYTHING = {"concepts": ["Sports", "World"], "top_fraction": 1.0, "tau": 3.0}
Serve = Callable[..., RunningServer]
Keyed = tuple[RunningServer, dict[str, str], KeyStore]


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return PROTOCOLS[request.param]


def post(running: RunningServer, protocol: Protocol, body: Any, **more: Any) -> httpx.Response:
    return running.http.post(protocol.path(running.service.name), json=body, **more)


def labels(running: RunningServer, protocol: Protocol, **fields: Any) -> list[str]:
    """What /v1/classify answers."""
    return [each["label"] for each in running.classify(TEXTS, **fields).json()["results"]]


def test_it_answers_as_v1_does(server: RunningServer, protocol: Protocol) -> None:
    reply = post(server, protocol, protocol.ask(TEXTS))
    assert protocol.labels(reply.json()) == labels(server, protocol)
    assert reply.headers["x-neuronlens-source"] == "none"
    assert "x-neuronlens-erased" not in reply.headers
    counted = {"method": "POST", "route": protocol.path("{model}"), "status": "200"}
    value = server.value
    until(lambda: value("neuronlens_http_requests_total", counted) == 1)


@pytest.mark.parametrize("erase", [EVERYTHING, ["Sports"], [{"concept": "Météo & co", "tau": 1}, "Sci/Tech"], []])
def test_a_request_may_say_what_to_erase(server: RunningServer, protocol: Protocol, erase: Any) -> None:
    reply = post(server, protocol, protocol.erase(protocol.ask(TEXTS), erase))
    expected = server.classify(TEXTS, erase=erase).json()
    assert protocol.labels(reply.json()) == [each["label"] for each in expected["results"]]
    erased = [unquote(name) for name in reply.headers.get("x-neuronlens-erased", "").split(",") if name]
    assert erased == expected["erasure"]["concepts"]
    assert reply.headers["x-neuronlens-generation"] == expected["erasure"]["generation"]


def test_what_is_live_is_erased(server: RunningServer, protocol: Protocol) -> None:
    server.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Sports", top_fraction=1.0)))
    server.service.mirror.refresh()
    reply = post(server, protocol, protocol.ask(TEXTS))
    assert (reply.headers["x-neuronlens-source"], reply.headers["x-neuronlens-erased"]) == ("live", "Sports")
    assert protocol.labels(reply.json()) == labels(server, protocol)
    spared = post(server, protocol, protocol.erase(protocol.ask(TEXTS), []))
    assert "x-neuronlens-erased" not in spared.headers


def test_what_is_enforced_is_erased_whatever_is_asked(server: RunningServer, protocol: Protocol) -> None:
    server.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="Météo & co"), enforced=True))
    server.service.mirror.refresh()
    for erase in ([], ["World"]):
        reply = post(server, protocol, protocol.erase(protocol.ask(TEXTS), erase))
        erased = [unquote(name) for name in reply.headers["x-neuronlens-erased"].split(",")]
        assert erased == ["Météo & co", *erase]


def test_an_erasure_that_cannot_be_is_refused_in_its_words(server: RunningServer, protocol: Protocol) -> None:
    reply = post(server, protocol, protocol.erase(protocol.ask(TEXTS), ["Weather"]))
    assert "'Weather'" in protocol.error(refused(reply, 404, "unknown_concept"))
    for erase in ({"concepts": ["Sports"], "tau": -1}, 5, {"concept": "Sports"}):
        reply = post(server, protocol, protocol.erase(protocol.ask(TEXTS), erase))
        assert protocol.error(refused(reply, protocol.invalid, "invalid"))
    reply = post(server, protocol, protocol.erase(protocol.ask(TEXTS), ["Sports", "Sports"]))
    assert protocol.error(refused(reply, protocol.invalid, "invalid_erasure"))


def test_unknown_fields_are_ignored(server: RunningServer, protocol: Protocol) -> None:
    body = {**protocol.ask(TEXTS), "no such field": {"a": [1]}, "options": {"wait_for_model": True}}
    assert post(server, protocol, body, params={"whatever": "x"}).status_code == 200


def test_limits_hold(start_server: Serve, fitted: Fitted, protocol: Protocol) -> None:
    running = with_ranges(start_server(max_texts=2, max_characters=50, max_body_bytes=2000), fitted)
    assert post(running, protocol, protocol.ask(["a", "b"])).status_code == 200
    for texts, code in (
        (["a"] * 3, "too_many_texts"),
        (["a" * 51], "text_too_large"),
        (["a" * 2000], "body_too_large"),
    ):
        assert protocol.error(refused(post(running, protocol, protocol.ask(texts)), 413, code))


def test_what_is_no_json_is_refused_in_its_words(server: RunningServer, protocol: Protocol) -> None:
    path = protocol.path(server.service.name)
    assert protocol.error(refused(server.http.post(path, content=b"{", headers=JSON), 400, "malformed"))
    undeclared = server.http.post(path, content=b"{}")
    if protocol is PROTOCOLS["v2"]:  # its clients declare nothing
        assert protocol.error(refused(undeclared, 400, "invalid"))
    else:
        assert protocol.error(refused(undeclared, 415, "unsupported_media_type"))
    assert protocol.error(refused(server.http.post(path, json=[]), protocol.invalid, "invalid"))


JSON = {"Content-Type": "application/json"}


def test_half_a_surrogate_pair_is_read_as_a_question_mark(server: RunningServer, protocol: Protocol) -> None:
    """Legal in JSON, and no Unicode text: tokenizers take none, so each half is replaced, and nothing else breaks."""
    halves = ["half \ud800 of one", "\udc00", "the wrong way \udc00\ud800 round"]
    marks = ["half ? of one", "?", "the wrong way ?? round"]
    path = protocol.path(server.service.name)
    reply = server.http.post(
        path, content=json.dumps(protocol.ask(halves)), headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == 200, reply.text
    assert protocol.labels(reply.json()) == protocol.labels(post(server, protocol, protocol.ask(marks)).json())
    assert "surrogate" not in reply.text


def test_a_deadline_holds(server: RunningServer, protocol: Protocol) -> None:
    late = post(server, protocol, protocol.ask(TEXTS), headers={"X-Request-Timeout": "1e-9"})
    assert protocol.error(refused(late, 504, "deadline_exceeded"))


def test_overload_is_refused_in_its_words(start_server: Serve, fitted: Fitted, protocol: Protocol) -> None:
    running = with_ranges(start_server(max_queue_texts=len(TEXTS)), fitted)

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits) as http:
            path, body = protocol.path(running.service.name), protocol.ask(TEXTS)
            return await asyncio.gather(*(http.post(path, json=body) for _ in range(60)))

    answers = asyncio.run(flood())
    full = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(full) < len(answers)
    for answer in full:
        assert protocol.error(refused(answer, 429, "queue_full"))
        assert int(answer.headers["retry-after"]) >= 1
    value = running.value
    assert value("neuronlens_rejections_total", {"reason": "queue_full"}) == len(full)
    labels = {"method": "POST", "route": protocol.path("{model}"), "status": "429"}
    until(lambda: value("neuronlens_http_requests_total", labels) == len(full))  # counted once the reply is sent


def test_a_draining_server_says_so(server: RunningServer, protocol: Protocol) -> None:
    server.service.engine.drain()
    assert protocol.error(refused(post(server, protocol, protocol.ask(TEXTS)), 503, "draining"))


def test_it_needs_a_key_with_scope_infer(server_with_keys: Keyed, protocol: Protocol) -> None:
    running, tokens, _ = server_with_keys
    body = protocol.ask(TEXTS)
    assert protocol.error(refused(post(running, protocol, body), 401, "no_key"))
    assert protocol.error(refused(post(running, protocol, body, headers=bearer("nl_wrong")), 401, "bad_key"))
    assert protocol.error(refused(post(running, protocol, body, headers=bearer(tokens["read"])), 403, "wrong_scope"))
    assert post(running, protocol, body, headers=bearer(tokens["infer"])).status_code == 200


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_header_holds_any_name_and_never_too_much() -> None:
    names = ["Sci/Tech", "a,b", "é\r\nX: y", "*", "日本" * 10]
    assert [unquote(name) for name in erased_header(names).split(",")] == names
    many = erased_header([f"concept {n} é" for n in range(1000)])
    assert len(many) <= LONGEST_HEADER + 2
    assert many.endswith(",*")
    assert many.isascii()
    assert erased_header(["é" * 500]) == "*"
