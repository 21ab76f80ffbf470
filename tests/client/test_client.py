"""Both clients against a real server: calls, errors, long lists, keys."""

import inspect
import json
import math
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args, get_overloads, get_type_hints

import httpx
import pytest
from pydantic import BaseModel

import neuronlens_client
from app.schemas import requests
from neuronlens_client import (
    AccessDenied,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    ErasureSettings,
    ErasureSpec,
    InvalidRequest,
    LiveSpec,
    NeuronLensError,
    NotFound,
    Overloaded,
    ReplicasBehind,
    Result,
    StaleGeneration,
    TooLarge,
    Unavailable,
    errors,
)
from neuronlens_client.request_types import ErasuresSpec
from range_store.domain.erasure import RANKINGS
from tests.client.conftest import Clock
from tests.e2e.reports import write_report
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import KeyedServer, RunningServer
from tests.workers.texts import labelled_texts
from workers.fitting.fit import FitResult

ClientOf = Callable[..., Any]
StartShared = Callable[..., RunningServer]
ERRORS: list[tuple[Callable[[Any], Any], type[NeuronLensError], str]] = [
    (lambda client: client.classify("a", erase="Nonsense"), NotFound, "unknown_concept"),
    (lambda client: client.switch_on(".."), NotFound, "unknown_concept"),
    (lambda client: client.neuron(-1, 10**6), NotFound, "unknown_neuron"),
    (lambda client: client.range_set("x"), NotFound, "unknown_range_set"),
    (lambda client: client.classify("a", erase=[{"concept": "Sports", "tau": -1}]), InvalidRequest, "invalid"),
    (lambda client: client.classify("a", erase={"concepts": ["Sports"], "tua": 1}), InvalidRequest, "invalid"),
    (lambda client: client.classify(["a", 3]), InvalidRequest, "invalid"),
    (lambda client: client.classify("word " * 5000, truncate=False), InvalidRequest, "text_too_long"),
    (lambda client: client.classify("a", erase=["Sports", "Sports"]), InvalidRequest, "invalid_erasure"),
    (lambda client: client.ranges("Sports", layer=0), InvalidRequest, "not_fitted"),
    (lambda client: client.classify("x" * 200_000), TooLarge, "text_too_large"),
]
TEXTS = [text for text, _ in labelled_texts(12, seed=8)]


def unknown_fields(reply: BaseModel) -> Iterator[str]:
    """Fields of a reply that the client does not declare."""
    yield from (f"{type(reply).__name__}.{name}" for name in reply.model_extra or {})
    for name in type(reply).model_fields:
        value = getattr(reply, name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, BaseModel):
                yield from unknown_fields(each)


def assert_same_answers(ones: Any, others: Any) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.label == other.label
        assert math.isclose(one.score, other.score, abs_tol=1e-4)
        assert one.masked_neurons == other.masked_neurons


def test_answers_equal_the_replies_of_the_server(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url)
    fields: dict[str, Any] = {"erase": ["Sports"], "compare": True, "top_k": 2, "activation": "none"}
    raw = server.classify(TEXTS[:3], **fields).json()
    found = client.classify(TEXTS[:3], **fields)
    assert not list(unknown_fields(found))
    assert [each.model_dump(mode="json") for each in found.results] == raw["results"]
    assert [each.model_dump(mode="json") for each in found.plans] == [raw["erasure"]]
    assert found.erasure.source == "request"
    assert (found.model, found.usage.tokens) == (raw["model"], raw["usage"]["tokens"])
    one = client.classify(TEXTS[0], **fields)
    assert isinstance(one, Result)
    assert not list(unknown_fields(one))
    assert_same_answers([one], found.results[:1])
    assert one.baseline is not None
    assert one.erasure == found.erasure
    assert client.classify(TEXTS[0]).erasure.source == "none"
    assert client.classify([]).results == ()


def test_reports_are_listed_and_read(client_of: ClientOf, server: RunningServer) -> None:
    client, reports = client_of(server.url), server.service.settings.reports
    assert client.reports().reports == ()
    name = "50 % of “what?”, a.b"
    directory = write_report(reports, name)
    try:
        (found,) = client.reports().reports
        assert not list(unknown_fields(found))
        assert (found.id, found.state, found.model, found.texts) == (name, "complete", "tiny-news", 7)
        assert client.report(name) == found
        for file in found.files:
            assert client.report_file(name, file) == (directory / file).read_bytes()
        (directory / "report.html").unlink()
        assert client.report(name).state == "incomplete"
        for call in (lambda: client.report(".."), lambda: client.report_file(name, "report.html")):
            with pytest.raises(NotFound) as missing:
                call()
            assert missing.value.code == "unknown_report"
    finally:
        shutil.rmtree(reports)


def test_a_block_erases_without_changing_live_erasures(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url)
    client.switch_on("World")
    before = client.erasures()
    with client.erase("Sports", tau=2, top_fraction=1.0):
        erased = client.classify(TEXTS)
        assert erased.erasure.source == "request"
        assert [(each.concept, each.tau) for each in erased.erasure.erasures] == [("Sports", 2)]
    assert_same_answers(
        erased.results, client.classify(TEXTS, erase={"concepts": ["Sports"], "tau": 2, "top_fraction": 1.0}).results
    )
    with client.erase():
        assert client.classify(TEXTS[0]).erasure.concepts == ()
    assert client.classify(TEXTS[0]).erasure.concepts == ("World",)
    assert client.erasures() == before


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_a_list_in_parts_gets_the_answers_of_the_whole(client_of: ClientOf, server: RunningServer, size: int) -> None:
    whole = client_of(server.url).classify(TEXTS, erase=["Sports"])
    parts = client_of(server.url, batch_size=size).classify(TEXTS, erase=["Sports"])
    assert_same_answers(parts.results, whole.results)
    assert parts.usage == whole.usage
    assert len(parts.plans) == math.ceil(12 / size)
    assert all(plan == whole.erasure for plan in parts.plans)


def test_a_list_is_split_into_parts_that_the_server_takes(
    client_of: ClientOf, start_shared: StartShared, server: RunningServer, fitted: FitResult
) -> None:
    small = start_shared(fitted, max_texts=5)
    found = client_of(small.url).classify(TEXTS, erase=["Sports"])
    assert_same_answers(found.results, client_of(server.url).classify(TEXTS, erase=["Sports"]).results)
    assert len(found.plans) == 4  # halved twice
    assert len(client_of(small.url).classify(["a"] * 300).plans) == 60  # lists of this length ask for the limit first


def test_a_single_text_that_is_too_large_is_an_error(
    client_of: ClientOf, start_shared: StartShared, fitted: FitResult
) -> None:
    small = start_shared(fitted, max_queue_tokens=16)
    with pytest.raises(TooLarge) as raised:
        client_of(small.url).classify(["word " * 300])
    assert raised.value.code == "request_too_large"


def test_every_reply_equals_the_json_of_the_server(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url, model=server.service.name)
    client.switch_on("Sports", tau=2, layer=[-2, -1], replacement={"damp": 0.5}, reason="a try", expires_in=600)
    range_set = client.range_sets().active
    replies: list[tuple[BaseModel, str]] = [
        (client.erasures(), "/v1/erasures"),
        (client.audit(), "/v1/audit"),
        (client.range_sets(), "/v1/range-sets"),
        (client.range_set(range_set), f"/v1/range-sets/{range_set}"),
        (client.concepts(), "/v1/concepts"),
        (client.ranges("Sci/Tech", tau=1, limit=3), "/v1/concepts/Sci%2FTech/ranges?tau=1&limit=3"),
        (client.neuron(-1, 3), "/v1/neurons/-1/3"),
        (client.overlap(ranking="probeless"), "/v1/overlap?ranking=probeless"),
        (client.models(), "/v1/models"),
        (client.capabilities(), "/v1/capabilities"),
    ]
    until(lambda: all(each.current for each in client.replicas().replicas))  # a server reports at intervals
    listed, expected = client.replicas(), server.http.get("/v1/replicas").json()  # ages differ
    assert not list(unknown_fields(listed))
    assert listed.model_dump(mode="json", exclude={"replicas": {0: {"age"}}}) == {
        **expected,
        "replicas": [{name: value for name, value in expected["replicas"][0].items() if name != "age"}],
    }
    for reply, path in replies:
        assert reply.model_dump(mode="json") == server.http.get(path).json(), path
        assert not list(unknown_fields(reply)), path
    assert client.ready().checks["store"] is True


def test_tokens_and_activations_equal_the_json_of_the_server(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url)
    for reply, path, body in (
        (client.tokenize("a goal 🎉"), "/v1/tokenize", {"inputs": "a goal 🎉"}),
        (
            client.tokenize(("a", "b"), add_special_tokens=False),
            "/v1/tokenize",
            {"inputs": ["a", "b"], "add_special_tokens": False},
        ),
        (
            client.activations(["a"], (3, 1), layer=-2),
            "/v1/activations",
            {"inputs": ["a"], "neurons": [3, 1], "layer": -2},
        ),
    ):
        assert reply.model_dump(mode="json") == server.http.post(path, json=body).json()
        assert not list(unknown_fields(reply))


def test_typed_settings_are_the_fields_that_the_server_accepts() -> None:
    for typed, model in (
        (ErasureSettings, requests.ErasureSettings),
        (ErasureSpec, requests.ErasureIn),
        (ErasuresSpec, requests.ErasuresIn),
        (LiveSpec, requests.NamedLiveIn),
    ):
        assert set(typed.__annotations__) == set(model.model_fields)
    assert get_args(get_type_hints(ErasureSettings)["ranking"]) == RANKINGS


def test_neurons_are_read_page_by_page(
    client_of: ClientOf, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(server.url)
    whole = client.ranges("Météo & co")
    assert len(whole.neurons) == client.models().models[0].hidden_size
    for module in ("client", "async_client"):
        monkeypatch.setattr(f"neuronlens_client.{module}.PAGE_SIZE", 5)
    assert client.ranges("Météo & co") == whole
    seven = client.ranges("Météo & co", limit=7)
    assert seven.neurons == whole.neurons[:7]
    assert seven.next_cursor is not None


@pytest.mark.parametrize("concept", ["Sports", "Sci/Tech", "Météo & co"])
def test_live_erasures_are_switched_on_and_off(client_of: ClientOf, server: RunningServer, concept: str) -> None:
    client = client_of(server.url)
    on = client.switch_on(concept, tau=3, reason="a try", enforced=True)
    assert on.concepts == (concept,)
    assert (on.erasures[0].tau, on.erasures[0].reason, on.erasures[0].enforced) == (3, "a try", True)
    assert client.erasures() == on
    with pytest.raises(StaleGeneration) as raised:
        client.switch_off(concept, if_match="00000000-1")
    assert raised.value.generation == on.generation
    off = client.switch_off(concept, reason="enough", if_match=on.generation)
    assert off.concepts == ()
    both = client.replace(["World", {"concept": concept, "tau": 1, "enforced": True}], if_match=off.generation)
    assert set(both.concepts) == {"World", concept}
    assert [entry.reason for entry in client.audit(3).entries] == [None, "enough", "a try"]


def test_a_change_waits_for_all_replicas_and_requests_insist_on_it(
    client_of: ClientOf, fresh_server: RunningServer
) -> None:
    client, store = client_of(fresh_server.url), fresh_server.service.store
    since = store.keys.replicas, "since"
    store.client.hset(*since, str(time.time() + 3600))  # too early to know which replicas report
    with pytest.raises(ReplicasBehind, match="is made") as raised:
        client.switch_on("Sports", wait="all", wait_seconds=0.01)
    own = {each.name for each in client.replicas().replicas if each.this}
    assert raised.value.status == 504
    assert set(raised.value.missing) <= own  # the server may not have read its own change yet
    assert raised.value.generation == client.erasures().generation
    store.client.hset(*since, "0")  # from now on, all live replicas have reported
    client.replace(["World"], wait="all", wait_seconds=60)
    store.replicas.report("elsewhere:1:ab", "00000000-1", None, seconds=600)
    with pytest.raises(ReplicasBehind) as raised:
        client.switch_off("World", wait="all", wait_seconds=0.2)
    assert {"elsewhere:1:ab"} <= set(raised.value.missing) <= {"elsewhere:1:ab"} | own
    listed = client.replicas()
    assert {each.name: each.current for each in listed.replicas if not each.this} == {"elsewhere:1:ab": False}
    store.replicas.remove("elsewhere:1:ab")
    state = client.activate(listed.replicas[0].range_set or client.erasures().range_set, wait="all", wait_seconds=60)
    assert client.classify("a goal", min_generation=state.generation).erasure.generation == state.generation
    with pytest.raises(Unavailable) as behind:
        client_of(fresh_server.url, retries=0).classify("a goal", min_generation="00000000-1")
    assert (behind.value.code, behind.value.problem["generation"]) == ("behind", state.generation)


def test_range_sets_are_listed_and_activated(client_of: ClientOf, fresh_server: RunningServer) -> None:
    client, store = client_of(fresh_server.url), fresh_server.service.store
    identity = fresh_server.model.identity
    last = identity.n_layers - 1
    made = random_range_set(
        1, identity.labels, identity.hidden_size, identity.n_layers, [last], fingerprint=identity.fingerprint
    )
    (first,) = client.range_sets().range_sets
    last_only = store.range_sets.publish(*made)
    client.switch_on("Sports", layer=-2)
    with pytest.raises(Conflict) as raised:
        client.activate(last_only)
    assert raised.value.code == "unresolvable_erasure"
    state = client.activate(last_only, force=True, reason="only the last block")
    assert (state.range_set, state.concepts) == (last_only, ())
    assert client.activate(first.id, if_match=state.generation).range_set == first.id


def test_errors_have_the_code_of_the_server(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url, headers={"X-Request-ID": "mine"})
    for call, kind, code in ERRORS:
        with pytest.raises(kind) as raised:
            call(client)
        error = raised.value
        assert type(error) is kind
        assert error.code == code
        assert error.request_id == "mine"
        if isinstance(error, NotFound) and error.code == "unknown_concept":
            assert "Sci/Tech" in error.known
        if isinstance(error, InvalidRequest) and error.code == "invalid":
            assert error.errors[0]["loc"]
        if error.code == "not_fitted":
            assert error.problem["fitted"]


def test_any_text_is_sent_unchanged(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url)
    for text in ("", "\0", "a lone surrogate: \ud800", "\u2028 日本語 🎉", "a" * 5000):
        raw = server.http.post(
            "/v1/classify", content=json.dumps({"inputs": text}), headers={"Content-Type": "application/json"}
        )
        if raw.status_code == 200:
            assert_same_answers([client.classify(text)], [Result.model_validate(raw.json()["results"][0])])
        else:
            with pytest.raises(NeuronLensError) as raised:
                client.classify(text)
            assert raised.value.code == raw.json()["code"]


def test_another_model_is_not_found(client_of: ClientOf, server: RunningServer) -> None:
    client = client_of(server.url, model="another")
    for call in (client.erasures, client.concepts, lambda: client.classify("a"), lambda: client.switch_on("Sports")):
        with pytest.raises(NotFound) as raised:
            call()
        assert raised.value.code == "unknown_model"


def test_a_missing_range_set_is_an_error_without_retries(client_of: ClientOf, start_shared: StartShared) -> None:
    client = client_of(start_shared().url, retries=1000)
    assert client.classify("a").label
    with pytest.raises(Unavailable) as raised:
        client.classify("a", erase="Sports")
    assert raised.value.code == "no_range_set"


def test_readiness_is_requested_once(client_of: ClientOf, fresh_server: RunningServer) -> None:
    client = client_of(fresh_server.url, retries=1000)
    assert client.ready().problem is None
    fresh_server.service.engine.drain()
    with pytest.raises(Unavailable) as raised:
        client.ready()
    assert raised.value.problem["checks"]


def test_keys_are_sent_and_never_shown(
    client_of: ClientOf, keyed_server: KeyedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, tokens = keyed_server
    infer, admin = client_of(running.url, tokens["infer"]), client_of(running.url, tokens["admin"])
    assert infer.classify(TEXTS).results
    assert admin.switch_on("Sports").erasures[0].by == "key:the-admin"
    for call, status in (
        (client_of(running.url).erasures, 401),
        (client_of(running.url, "nl_wrong").erasures, 401),
        (infer.erasures, 403),
        (lambda: client_of(running.url, tokens["read"]).switch_off("Sports"), 403),
    ):
        with pytest.raises(AccessDenied) as raised:
            call()
        assert raised.value.status == status
        assert not any(token in f"{raised.value!r} {raised.value.__dict__}" for token in tokens.values())
    assert tokens["infer"] not in repr(infer)
    monkeypatch.setenv("NEURONLENS_API_KEY", tokens["read"])
    assert client_of(running.url).erasures().concepts == ("Sports",)
    with pytest.raises(AccessDenied):
        client_of(running.url, "").erasures()


def test_a_key_without_the_scope_read_can_classify_long_lists(client_of: ClientOf, keyed_server: KeyedServer) -> None:
    running, tokens = keyed_server
    assert len(client_of(running.url, tokens["infer"]).classify(["a"] * 300).results) == 300


def test_a_missed_deadline_is_an_error(client_of: ClientOf, server: RunningServer) -> None:
    with server.model.steered._lock, pytest.raises(DeadlineExceeded):  # the model answers nothing meanwhile
        client_of(server.url).classify("a", timeout=0.05)


def test_a_call_waits_while_the_queue_is_full(
    client_of: ClientOf, start_shared: StartShared, fitted: FitResult, clock: Clock
) -> None:
    running = start_shared(fitted, max_queue_texts=4)
    engine, lock, value = running.service.engine, running.model.steered._lock, running.value
    expected = running.classify(TEXTS[:4]).json()["results"]

    def release() -> None:
        if len(clock.pauses) == 1:
            lock.release()
            until(lambda: value("neuronlens_queue_texts") == 0)

    clock.on_pause = release
    with ThreadPoolExecutor(2) as pool:
        lock.acquire()  # the model answers nothing until the first pause of the client
        accepted = [pool.submit(running.classify, TEXTS[:4])]
        until(lambda: engine._scheduler.running)
        accepted.append(pool.submit(running.classify, TEXTS[:4]))
        until(lambda: value("neuronlens_queue_texts") == 4)
        with pytest.raises(Overloaded):
            client_of(running.url, retries=0).classify(TEXTS[:4])
        assert clock.pauses == []
        found = client_of(running.url).classify(TEXTS[:4])
        assert [each.result().status_code for each in accepted] == [200, 200]
    assert_same_answers(found.results, [Result.model_validate(each) for each in expected])
    assert len(clock.pauses) == 1
    assert clock.pauses[0] >= 1


def test_a_given_httpx_client_stays_open(server: RunningServer) -> None:
    with httpx.Client() as http:
        for _ in range(2):
            with neuronlens_client.Client(server.url, http=http) as client:
                assert client.ready().status == "ready"


def test_a_closed_client_raises(server: RunningServer) -> None:
    client = neuronlens_client.Client(server.url)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.ready()


def test_the_type_of_an_answer_follows_the_type_of_the_inputs() -> None:
    """mypy checks the types of all calls in `test_typing.py`, which takes longer."""
    for client in (neuronlens_client.Client, neuronlens_client.AsyncClient):
        hints = [get_type_hints(overload) for overload in get_overloads(client.classify)]
        returned = {str(hint["inputs"]): hint["return"] for hint in hints}
        assert returned[str(str)] is neuronlens_client.Answer
        assert neuronlens_client.Answers in returned.values()


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, Any]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(each).parameters for name, each in found if not name.startswith("_")}

    blocking, asynchronous = methods(neuronlens_client.Client), methods(neuronlens_client.AsyncClient)
    assert blocking.pop("close") == asynchronous.pop("aclose")
    assert blocking == asynchronous
    assert len(blocking) > 10


def test_public_names_are_exported_and_errors_are_documented() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, NeuronLensError)]
    assert len(kinds) > 10
    for kind in kinds:
        assert kind.__name__ in neuronlens_client.__all__
        assert f"- {kind.__name__}" in (errors.__doc__ or "")
    assert all(hasattr(neuronlens_client, name) for name in neuronlens_client.__all__)
    assert issubclass(ConnectionFailed, NeuronLensError)


def test_the_client_imports_nothing_of_the_service() -> None:
    code = "import sys, neuronlens_client; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "httpx" in loaded
    assert not loaded & {"app", "workers", "range_store", "torch", "numpy", "redis", "fastapi", "starlette"}


def test_errors_can_be_pickled() -> None:
    error = StaleGeneration(
        "gone", status=412, code="stale_generation", request_id="r", problem={"generation": "00000000-2"}
    )
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.generation, again.request_id) == (str(error), "00000000-2", "r")
