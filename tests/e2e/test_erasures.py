"""Live erasures and range sets over HTTP: toggles, generations, conflicts, names of every kind."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from range_store.embedded import EmbeddedRedis, connect
from tests.e2e.conftest import Running, ready
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.corpus import load_corpus
from workers.fitting.fit import Fitted, fit

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty"


def erased(news: Running) -> list[str]:
    concepts: list[str] = news.classify(TEXT).json()["erasure"]["concepts"]
    return concepts


@pytest.mark.parametrize("concept", ["Sports", "Sci/Tech", "Météo & co"])
def test_a_toggle_is_seen_by_the_next_request(news: Running, concept: str) -> None:
    path = f"/v1/erasures/{quote(concept, safe='')}"
    before = news.http.get("/v1/erasures").json()["generation"]
    on = news.http.put(path, json={"top_fraction": 1.0, "reason": "a trial"})
    assert on.status_code == 200, on.text
    assert on.json()["generation"] != before
    assert on.headers["etag"] == f'"{on.json()["generation"]}"'
    answer = news.classify(TEXT).json()
    assert answer["erasure"]["concepts"] == [concept]
    assert answer["erasure"]["source"] == "live"
    assert answer["erasure"]["generation"] == on.json()["generation"]
    assert news.classify(TEXT, erase=[]).json()["erasure"]["concepts"] == []
    listed = news.http.get("/v1/erasures").json()["erasures"]
    assert [(e["concept"], e["reason"], e["top_fraction"], e["layers"]) for e in listed] == [
        (concept, "a trial", 1.0, [2])
    ]
    assert [c["concept"] for c in news.http.get("/v1/concepts").json()["concepts"] if c["erased"]] == [concept]
    off = news.http.delete(path, params={"reason": "enough"})
    assert off.json()["erasures"] == []
    assert erased(news) == []
    audit = news.service.store.audit(2)
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


def test_paths_take_a_concept_whole_whatever_it_holds(news: Running) -> None:
    identity = news.service.model.identity
    named, inspect = random_range_set(
        5, NAMES, hidden=identity.hidden_size, n_layers=identity.n_layers, fingerprint=identity.fingerprint
    )
    store = news.service.store
    news.http.put("/v1/range-sets/active", json={"id": store.publish(named, inspect)}).raise_for_status()
    for concept in NAMES:
        on = news.http.put(f"/v1/erasures/{in_path(concept)}")
        assert [each["concept"] for each in on.json()["erasures"]] == [concept]
        assert erased(news) == [concept]
        ranges = news.http.get(f"/v1/concepts/{in_path(concept)}/ranges", params={"limit": 1}).json()
        assert (ranges["concept"], set(ranges["neurons"][0]["overlap"])) == (concept, set(NAMES) - {concept})
        assert news.http.delete(f"/v1/erasures/{in_path(concept)}").json()["erasures"] == []
        if concept.isprintable():  # a query is another way
            named = {"name": concept}
            on = news.http.put("/v1/erasures/-", params=named)
            assert [each["concept"] for each in on.json()["erasures"]] == [concept]
            assert news.http.get("/v1/concepts/-/ranges", params=named | {"limit": "1"}).json() == ranges
            assert news.http.delete("/v1/erasures/-", params=named).json()["erasures"] == []


def test_a_path_and_a_query_name_no_two_concepts(news: Running, problem: Problem) -> None:
    for method, path in (
        ("PUT", "/v1/erasures/Sports"),
        ("DELETE", "/v1/erasures/-x"),
        ("GET", "/v1/concepts/x/ranges"),
    ):
        said = problem(news.http.request(method, path, params={"name": "World"}), 422, "invalid")
        assert said["detail"].startswith("query.name: ")
    problem(news.http.put("/v1/erasures/-", params={"name": ""}), 422, "invalid")
    assert news.http.put("/v1/erasures/-", json={}).json()["known"]


def test_a_path_without_a_concept_is_no_path(news: Running, problem: Problem) -> None:
    problem(news.http.put("/v1/erasures/", json={}), 404, "not_found")
    problem(news.http.delete("/v1/erasures/"), 404, "not_found")
    problem(news.http.get("/v1/concepts//ranges"), 404, "not_found")


def test_a_slash_in_a_path_needs_no_escape(news: Running) -> None:
    assert news.http.put("/v1/erasures/Sci/Tech").status_code == 200
    assert erased(news) == ["Sci/Tech"]


def test_replacing_all_is_one_generation(news: Running) -> None:
    first = news.http.put("/v1/erasures", json={"erasures": [{"concept": "World"}, {"concept": "Sports", "tau": 1}]})
    counter = int(first.json()["generation"].partition("-")[2])
    second = news.http.put("/v1/erasures", json={"erasures": [{"concept": "Business"}]})
    assert int(second.json()["generation"].partition("-")[2]) == counter + 1
    assert erased(news) == ["Business"]
    assert news.http.put("/v1/erasures", json={"erasures": []}).json()["erasures"] == []


def test_if_match_guards_a_change(news: Running, problem: Problem) -> None:
    old = news.http.get("/v1/erasures").headers["etag"]
    new = news.http.put("/v1/erasures/World", headers={"If-Match": old}).headers["etag"]
    stale = news.http.put("/v1/erasures/Sports", headers={"If-Match": old})
    assert f'"{problem(stale, 412, "stale_generation")["generation"]}"' == new
    assert erased(news) == ["World"]
    problem(news.http.delete("/v1/erasures/World", headers={"If-Match": old}), 412, "stale_generation")
    problem(news.http.delete("/v1/erasures/World", headers={"If-Match": f"{old}, {old}"}), 412, "stale_generation")
    assert news.http.delete("/v1/erasures/World", headers={"If-Match": f"{old}, {new}"}).status_code == 200
    assert news.http.put("/v1/erasures/World", headers={"If-Match": "*"}).status_code == 200
    wrong = {"erasures": [{"concept": "World", "tau": -1}]}
    problem(news.http.put("/v1/erasures", json=wrong, headers={"If-Match": f"{old}, {old}"}), 422, "invalid")


def test_an_erasure_expires(news: Running) -> None:
    on = news.http.put("/v1/erasures/Sports", json={"expires_in": 2}).json()
    before = on["generation"]
    assert erased(news) == ["Sports"] or time.time() >= on["erasures"][0]["expires_at"]
    until(lambda: erased(news) == [])
    until(lambda: news.http.get("/v1/erasures").json()["generation"] != before)
    assert news.service.store.audit(1)[0].action == "expire"


def test_what_is_enforced_cannot_be_opted_out_of(news: Running) -> None:
    news.http.put("/v1/erasures/Sports", json={"enforced": True})
    answer = news.classify(TEXT, erase=["World"]).json()["erasure"]
    assert [(each["concept"], each["enforced"]) for each in answer["erasures"]] == [("Sports", True), ("World", False)]
    assert news.classify(TEXT, erase=[]).json()["erasure"]["concepts"] == ["Sports"]


def test_wrong_toggles(news: Running, problem: Problem) -> None:
    problem(news.http.put("/v1/erasures/Weather"), 404, "unknown_concept")
    problem(news.http.delete("/v1/erasures/Weather"), 404, "unknown_concept")
    problem(news.http.put("/v1/erasures/Sports", json={"layer": 0}), 422, "not_fitted")
    problem(news.http.put("/v1/erasures/Sports", json={"expires_in": 0}), 422, "invalid")
    problem(news.http.put("/v1/erasures/Sports", json={"reason": "x" * 501}), 422, "invalid")
    twice = {"erasures": [{"concept": "World"}, {"concept": "World"}]}
    problem(news.http.put("/v1/erasures", json=twice), 422, "invalid_erasure")
    problem(news.http.put("/v1/erasures/Sports?model=another"), 404, "unknown_model")
    problem(news.http.put("/v1/erasures/Sports", json={"model": "another"}), 404, "unknown_model")
    problem(news.http.put("/v1/erasures", json={"erasures": [], "model": "another"}), 404, "unknown_model")
    assert erased(news) == []


@pytest.mark.local
def test_activate_and_roll_back(news: Running, problem: Problem, tmp_path: Path) -> None:
    store, model = news.service.store, news.model
    first = store.live().range_set
    rows = [pair for pair in labelled_texts(40, seed=8) if pair[1] != "SciTech"]
    path = write_jsonl(tmp_path / "other.jsonl", rows)
    other = fit(model, load_corpus(str(path), labels=model.identity.labels), bins=64)
    second = store.publish(other.range_set, other.inspect)
    listed = news.http.get("/v1/range-sets").json()
    assert [(each["id"], each["active"]) for each in listed["range_sets"]] == [(second, False), (first, True)]
    assert news.http.put("/v1/range-sets/active", json={"id": second}).json()["range_set"] == second
    assert news.classify(TEXT).json()["erasure"]["range_set"] == second
    assert news.http.put("/v1/range-sets/active", json={"id": first}).json()["range_set"] == first
    news.http.put("/v1/erasures/Sci%2FTech")
    problem(news.http.put("/v1/range-sets/active", json={"id": second}), 409, "unresolvable_erasure")
    assert erased(news) == ["Sci/Tech"]
    forced = news.http.put("/v1/range-sets/active", json={"id": second, "force": True}).json()
    assert (forced["range_set"], forced["erasures"]) == (second, [])
    problem(news.http.put("/v1/range-sets/active", json={"id": "0" * 20}), 404, "unknown_range_set")


def test_a_range_set_of_another_model_is_refused(news: Running, problem: Problem) -> None:
    foreign, inspect = random_range_set(3)
    published = news.service.store.publish(foreign, inspect)
    problem(news.http.put("/v1/range-sets/active", json={"id": published}), 409, "foreign_range_set")
    assert news.http.get("/v1/erasures").json()["range_set"] != published


def test_provenance_of_a_range_set(news: Running) -> None:
    active = news.http.get("/v1/range-sets").json()["active"]
    shown = news.http.get(f"/v1/range-sets/{active}").json()
    assert shown["provenance"]["model"]["fingerprint"] == news.service.model.identity.fingerprint
    assert shown["provenance"]["settings"]["layers"] == [1, 2]


def test_two_servers_on_one_store_agree(serve: Callable[..., Running], fitted: Fitted) -> None:
    one = ready(serve(), fitted)
    two = serve(name=one.service.name)
    generation = one.http.put("/v1/erasures/Sports").json()["generation"]
    until(lambda: two.classify(TEXT).json()["erasure"]["generation"] == generation)
    assert erased(two) == ["Sports"]


@pytest.mark.local  # behind a fleet, an engine that missed the last change before Redis went has to say 503
def test_without_redis_the_last_snapshot_goes_on_answering(
    serve: Callable[..., Running], fitted: Fitted, problem: Problem, tmp_path: Path
) -> None:
    """Promise 5: nothing that was erased comes back, changes are refused, and readiness tells."""
    with connect(None, tmp_path / "redis") as client:
        assert isinstance(client, EmbeddedRedis)
        news = ready(serve(redis_url=client.url), fitted)
        generation = news.http.put("/v1/erasures/Sports").json()["generation"]
        client.shutdown(nosave=True)
        until(lambda: news.http.get("/readyz").json()["checks"]["store"] is False)
        answer = news.classify(TEXT).json()["erasure"]
        assert (answer["concepts"], answer["generation"]) == (["Sports"], generation)
        refused = news.http.put("/v1/erasures/World")
        problem(refused, 503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        problem(news.http.get("/v1/range-sets"), 503, "store_unavailable")
        assert news.http.get("/v1/concepts/Sports/ranges").status_code == 200
        assert news.value("neuronlens_store_up") == 0
        assert erased(news) == ["Sports"]
