"""Live erasures and range sets over HTTP: toggles, generations, conflicts, names of every kind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from range_store.embedded import EmbeddedRedis, connect
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer, with_ranges
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.corpus import load_corpus
from workers.fitting.fit import Fitted, fit

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty"


def erased(server: RunningServer) -> list[str]:
    concepts: list[str] = server.classify(TEXT).json()["erasure"]["concepts"]
    return concepts


@pytest.mark.parametrize("concept", ["Sports", "Sci/Tech", "Météo & co"])
def test_a_toggle_is_seen_by_the_next_request(server: RunningServer, concept: str) -> None:
    path = f"/v1/erasures/{quote(concept, safe='')}"
    before = server.http.get("/v1/erasures").json()["generation"]
    on = server.http.put(path, json={"top_fraction": 1.0, "reason": "a trial"})
    assert on.status_code == 200, on.text
    assert on.json()["generation"] != before
    assert on.headers["etag"] == f'"{on.json()["generation"]}"'
    answer = server.classify(TEXT).json()
    assert answer["erasure"]["concepts"] == [concept]
    assert answer["erasure"]["source"] == "live"
    assert answer["erasure"]["generation"] == on.json()["generation"]
    assert server.classify(TEXT, erase=[]).json()["erasure"]["concepts"] == []
    listed = server.http.get("/v1/erasures").json()["erasures"]
    assert [(e["concept"], e["reason"], e["top_fraction"], e["layers"]) for e in listed] == [
        (concept, "a trial", 1.0, [2])
    ]
    assert [c["concept"] for c in server.http.get("/v1/concepts").json()["concepts"] if c["erased"]] == [concept]
    off = server.http.delete(path, params={"reason": "enough"})
    assert off.json()["erasures"] == []
    assert erased(server) == []
    audit = server.service.store.audit(2)
    assert [(entry.by, entry.reason) for entry in audit] == [("http", "enough"), ("http", "a trial")]


NAMES = (
    "a b",
    "é",
    "ranges",
    "a/ranges",
    "..",
    ".",
    "/x",
    "x/",
    "100 %",
    "?",
    "#",
    "two\nlines",
    "x\n",
    "x",
    "日本 😀",
    "\x00",
)


def in_path(concept: str) -> str:
    """Dots too: clients resolve a bare `..` before they send it."""
    return quote(concept, safe="").replace(".", "%2E")


def test_paths_take_a_concept_whole_whatever_it_holds(server: RunningServer) -> None:
    identity = server.service.model.identity
    named, inspect = random_range_set(
        5, NAMES, hidden=identity.hidden_size, n_layers=identity.n_layers, fingerprint=identity.fingerprint
    )
    store = server.service.store
    server.http.put("/v1/range-sets/active", json={"id": store.publish(named, inspect)}).raise_for_status()
    for concept in NAMES:
        on = server.http.put(f"/v1/erasures/{in_path(concept)}")
        assert [each["concept"] for each in on.json()["erasures"]] == [concept]
        assert erased(server) == [concept]
        ranges = server.http.get(f"/v1/concepts/{in_path(concept)}/ranges", params={"limit": 1}).json()
        assert (ranges["concept"], set(ranges["neurons"][0]["overlap"])) == (concept, set(NAMES) - {concept})
        assert server.http.delete(f"/v1/erasures/{in_path(concept)}").json()["erasures"] == []
        if concept.isprintable():  # a query is another way
            named = {"name": concept}
            on = server.http.put("/v1/erasures/-", params=named)
            assert [each["concept"] for each in on.json()["erasures"]] == [concept]
            assert server.http.get("/v1/concepts/-/ranges", params=named | {"limit": "1"}).json() == ranges
            assert server.http.delete("/v1/erasures/-", params=named).json()["erasures"] == []


def test_a_path_and_a_query_name_no_two_concepts(server: RunningServer, problem: Problem) -> None:
    for method, path in (
        ("PUT", "/v1/erasures/Sports"),
        ("DELETE", "/v1/erasures/-x"),
        ("GET", "/v1/concepts/x/ranges"),
    ):
        said = problem(server.http.request(method, path, params={"name": "World"}), 422, "invalid")
        assert said["detail"].startswith("query.name: ")
    problem(server.http.put("/v1/erasures/-", params={"name": ""}), 422, "invalid")
    assert server.http.put("/v1/erasures/-", json={}).json()["known"]


def test_a_path_without_a_concept_is_no_path(server: RunningServer, problem: Problem) -> None:
    problem(server.http.put("/v1/erasures/", json={}), 404, "not_found")
    problem(server.http.delete("/v1/erasures/"), 404, "not_found")
    problem(server.http.get("/v1/concepts//ranges"), 404, "not_found")


def test_a_slash_in_a_path_needs_no_escape(server: RunningServer) -> None:
    assert server.http.put("/v1/erasures/Sci/Tech").status_code == 200
    assert erased(server) == ["Sci/Tech"]


def test_replacing_all_is_one_generation(server: RunningServer) -> None:
    first = server.http.put("/v1/erasures", json={"erasures": [{"concept": "World"}, {"concept": "Sports", "tau": 1}]})
    counter = int(first.json()["generation"].partition("-")[2])
    second = server.http.put("/v1/erasures", json={"erasures": [{"concept": "Business"}]})
    assert int(second.json()["generation"].partition("-")[2]) == counter + 1
    assert erased(server) == ["Business"]
    assert server.http.put("/v1/erasures", json={"erasures": []}).json()["erasures"] == []


def test_if_match_guards_a_change(server: RunningServer, problem: Problem) -> None:
    old = server.http.get("/v1/erasures").headers["etag"]
    new = server.http.put("/v1/erasures/World", headers={"If-Match": old}).headers["etag"]
    stale = server.http.put("/v1/erasures/Sports", headers={"If-Match": old})
    assert f'"{problem(stale, 412, "stale_generation")["generation"]}"' == new
    assert erased(server) == ["World"]
    problem(server.http.delete("/v1/erasures/World", headers={"If-Match": old}), 412, "stale_generation")
    problem(server.http.delete("/v1/erasures/World", headers={"If-Match": f"{old}, {old}"}), 412, "stale_generation")
    assert server.http.delete("/v1/erasures/World", headers={"If-Match": f"{old}, {new}"}).status_code == 200
    assert server.http.put("/v1/erasures/World", headers={"If-Match": "*"}).status_code == 200
    wrong = {"erasures": [{"concept": "World", "tau": -1}]}
    problem(server.http.put("/v1/erasures", json=wrong, headers={"If-Match": f"{old}, {old}"}), 422, "invalid")


def test_an_erasure_expires(server: RunningServer) -> None:
    on = server.http.put("/v1/erasures/Sports", json={"expires_in": 2}).json()
    before = on["generation"]
    assert erased(server) == ["Sports"] or time.time() >= on["erasures"][0]["expires_at"]
    until(lambda: erased(server) == [])
    until(lambda: server.http.get("/v1/erasures").json()["generation"] != before)
    assert server.service.store.audit(1)[0].action == "expire"


def test_what_is_enforced_cannot_be_opted_out_of(server: RunningServer) -> None:
    server.http.put("/v1/erasures/Sports", json={"enforced": True})
    answer = server.classify(TEXT, erase=["World"]).json()["erasure"]
    assert [(each["concept"], each["enforced"]) for each in answer["erasures"]] == [("Sports", True), ("World", False)]
    assert server.classify(TEXT, erase=[]).json()["erasure"]["concepts"] == ["Sports"]


def test_wrong_toggles(server: RunningServer, problem: Problem) -> None:
    problem(server.http.put("/v1/erasures/Weather"), 404, "unknown_concept")
    problem(server.http.delete("/v1/erasures/Weather"), 404, "unknown_concept")
    problem(server.http.put("/v1/erasures/Sports", json={"layer": 0}), 422, "not_fitted")
    problem(server.http.put("/v1/erasures/Sports", json={"expires_in": 0}), 422, "invalid")
    problem(server.http.put("/v1/erasures/Sports", json={"reason": "x" * 501}), 422, "invalid")
    twice = {"erasures": [{"concept": "World"}, {"concept": "World"}]}
    problem(server.http.put("/v1/erasures", json=twice), 422, "invalid_erasure")
    problem(server.http.put("/v1/erasures/Sports?model=another"), 404, "unknown_model")
    problem(server.http.put("/v1/erasures/Sports", json={"model": "another"}), 404, "unknown_model")
    problem(server.http.put("/v1/erasures", json={"erasures": [], "model": "another"}), 404, "unknown_model")
    assert erased(server) == []


@pytest.mark.local
def test_activate_and_roll_back(server: RunningServer, problem: Problem, tmp_path: Path) -> None:
    store, model = server.service.store, server.model
    first = store.live().range_set
    rows = [pair for pair in labelled_texts(40, seed=8) if pair[1] != "SciTech"]
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    other = fit(model, load_corpus(str(path), labels=model.identity.labels), bins=64)
    second = store.publish(other.range_set, other.inspect)
    listed = server.http.get("/v1/range-sets").json()
    assert [(each["id"], each["active"]) for each in listed["range_sets"]] == [(second, False), (first, True)]
    assert server.http.put("/v1/range-sets/active", json={"id": second}).json()["range_set"] == second
    assert server.classify(TEXT).json()["erasure"]["range_set"] == second
    assert server.http.put("/v1/range-sets/active", json={"id": first}).json()["range_set"] == first
    server.http.put("/v1/erasures/Sci%2FTech")
    problem(server.http.put("/v1/range-sets/active", json={"id": second}), 409, "unresolvable_erasure")
    assert erased(server) == ["Sci/Tech"]
    forced = server.http.put("/v1/range-sets/active", json={"id": second, "force": True}).json()
    assert (forced["range_set"], forced["erasures"]) == (second, [])
    problem(server.http.put("/v1/range-sets/active", json={"id": "0" * 20}), 404, "unknown_range_set")


def test_a_range_set_of_another_model_is_refused(server: RunningServer, problem: Problem) -> None:
    foreign, inspect = random_range_set(3)
    published = server.service.store.publish(foreign, inspect)
    problem(server.http.put("/v1/range-sets/active", json={"id": published}), 409, "foreign_range_set")
    assert server.http.get("/v1/erasures").json()["range_set"] != published


def test_provenance_of_a_range_set(server: RunningServer) -> None:
    active = server.http.get("/v1/range-sets").json()["active"]
    shown = server.http.get(f"/v1/range-sets/{active}").json()
    assert shown["provenance"]["model"]["fingerprint"] == server.service.model.identity.fingerprint
    assert shown["provenance"]["settings"]["layers"] == [1, 2]


def test_two_servers_on_one_store_agree(start_server: Callable[..., RunningServer], fitted: Fitted) -> None:
    one = with_ranges(start_server(), fitted)
    two_models = start_server(name=one.service.name)
    generation = one.http.put("/v1/erasures/Sports").json()["generation"]
    until(lambda: two_models.classify(TEXT).json()["erasure"]["generation"] == generation)
    assert erased(two_models) == ["Sports"]


@pytest.mark.local  # behind a fleet, an engine that missed the last change before Redis went has to say 503
def test_without_redis_the_last_snapshot_goes_on_answering(
    start_server: Callable[..., RunningServer], fitted: Fitted, problem: Problem, tmp_path: Path
) -> None:
    """Promise 5: nothing that was erased comes back, changes are refused, and readiness tells."""
    with connect(None, tmp_path / "redis") as client:
        assert isinstance(client, EmbeddedRedis)
        server = with_ranges(start_server(redis_url=client.url), fitted)
        generation = server.http.put("/v1/erasures/Sports").json()["generation"]
        client.shutdown(nosave=True)
        until(lambda: server.http.get("/readyz").json()["checks"]["store"] is False)
        answer = server.classify(TEXT).json()["erasure"]
        assert (answer["concepts"], answer["generation"]) == (["Sports"], generation)
        refused = server.http.put("/v1/erasures/World")
        problem(refused, 503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        problem(server.http.get("/v1/range-sets"), 503, "store_unavailable")
        assert server.http.get("/v1/concepts/Sports/ranges").status_code == 200
        assert server.value("neuronlens_store_up") == 0
        assert erased(server) == ["Sports"]
