"""Live erasures and range sets over HTTP: changes, generations, conflicts, and concept names in URLs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from range_store.embedded.connection import EmbeddedRedis, connect
from range_store.storage.clock import StoreClock
from range_store.storage.store import RangeStore
from tests.range_store.builders import in_dtype, random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer, random_ranges, with_ranges
from workers.fitting.fit import FitResult

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
TEXT = "the keeper saved a penalty"


def erased(server: RunningServer) -> list[str]:
    """Return the concepts that are erased from a request that names none."""
    concepts: list[str] = server.classify(TEXT).json()["erasure"]["concepts"]
    return concepts


@pytest.mark.parametrize("concept", ["Sports", "Sci/Tech", "Météo & co"])
def test_toggle_applies_to_the_next_request(server: RunningServer, concept: str) -> None:
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
    """Quote a concept for a path. Dots are quoted too, since clients resolve `..` before they send it."""
    return quote(concept, safe="").replace(".", "%2E")


def test_concept_names_with_special_characters_work_in_urls(server: RunningServer) -> None:
    published = server.service.store.range_sets.publish(*random_ranges(server.model.identity, 5, NAMES))
    server.http.put("/v1/range-sets/active", json={"id": published}).raise_for_status()
    for concept in NAMES:
        on = server.http.put(f"/v1/erasures/{in_path(concept)}")
        assert [each["concept"] for each in on.json()["erasures"]] == [concept]
        assert erased(server) == [concept]
        page = server.http.get(f"/v1/concepts/{in_path(concept)}/ranges", params={"limit": 1}).json()
        assert (page["concept"], set(page["neurons"][0]["overlap"])) == (concept, set(NAMES) - {concept})
        assert server.http.delete(f"/v1/erasures/{in_path(concept)}").json()["erasures"] == []
        if concept.isprintable():  # the query can name the concept instead
            query = {"name": concept}
            on = server.http.put("/v1/erasures/-", params=query)
            assert [each["concept"] for each in on.json()["erasures"]] == [concept]
            assert server.http.get("/v1/concepts/-/ranges", params=query | {"limit": "1"}).json() == page
            assert server.http.delete("/v1/erasures/-", params=query).json()["erasures"] == []


def test_concept_in_both_path_and_query_is_rejected(server: RunningServer, problem: Problem) -> None:
    for method, path in (
        ("PUT", "/v1/erasures/Sports"),
        ("DELETE", "/v1/erasures/-x"),
        ("GET", "/v1/concepts/x/ranges"),
    ):
        error = problem(server.http.request(method, path, params={"name": "World"}), 422, "invalid")
        assert error["detail"].startswith("query.name: ")
    problem(server.http.put("/v1/erasures/-", params={"name": ""}), 422, "invalid")
    assert server.http.put("/v1/erasures/-", json={}).json()["known"]


def test_path_without_a_concept_is_not_found(server: RunningServer, problem: Problem) -> None:
    problem(server.http.put("/v1/erasures/", json={}), 404, "not_found")
    problem(server.http.delete("/v1/erasures/"), 404, "not_found")
    problem(server.http.get("/v1/concepts//ranges"), 404, "not_found")


def test_slash_in_a_concept_needs_no_escaping(server: RunningServer) -> None:
    assert server.http.put("/v1/erasures/Sci/Tech").status_code == 200
    assert erased(server) == ["Sci/Tech"]


def test_replacing_all_erasures_makes_one_generation(server: RunningServer) -> None:
    first = server.http.put("/v1/erasures", json={"erasures": [{"concept": "World"}, {"concept": "Sports", "tau": 1}]})
    counter = int(first.json()["generation"].partition("-")[2])
    second = server.http.put("/v1/erasures", json={"erasures": [{"concept": "Business"}]})
    assert int(second.json()["generation"].partition("-")[2]) == counter + 1
    assert erased(server) == ["Business"]
    assert server.http.put("/v1/erasures", json={"erasures": []}).json()["erasures"] == []


def test_change_with_a_stale_if_match_is_rejected(server: RunningServer, problem: Problem) -> None:
    old = server.http.get("/v1/erasures").headers["etag"]
    new = server.http.put("/v1/erasures/World", headers={"If-Match": old}).headers["etag"]
    stale = server.http.put("/v1/erasures/Sports", headers={"If-Match": old})
    assert f'"{problem(stale, 412, "stale_generation")["generation"]}"' == new
    assert erased(server) == ["World"]
    problem(server.http.delete("/v1/erasures/World", headers={"If-Match": old}), 412, "stale_generation")
    problem(server.http.delete("/v1/erasures/World", headers={"If-Match": f"{old}, {old}"}), 412, "stale_generation")
    assert server.http.delete("/v1/erasures/World", headers={"If-Match": f"{old}, {new}"}).status_code == 200
    current = server.http.put("/v1/erasures/World", headers={"If-Match": "*"}).headers["etag"]
    for weak in (f"W/{current}", f"W/{current}, {old}"):
        problem(server.http.put("/v1/erasures/Sports", headers={"If-Match": weak}), 412, "stale_generation")
    assert server.http.get("/v1/erasures").headers["etag"] == current
    wrong = {"erasures": [{"concept": "World", "tau": -1}]}
    problem(server.http.put("/v1/erasures", json=wrong, headers={"If-Match": f"{old}, {old}"}), 422, "invalid")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/erasures/Sports", {"expires_in": 60}),
        ("DELETE", "/v1/erasures/World", None),
        ("PUT", "/v1/erasures", {"erasures": [{"concept": "Sports"}]}),
        ("PUT", "/v1/range-sets/active", {}),
    ],
)
def test_a_guarded_change_sent_again_is_not_stale_about_itself(
    server: RunningServer, problem: Problem, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """The answer to the first try was lost: the second one finds the change made, and makes it no second time."""
    if path.endswith("active"):
        body = {"id": server.service.store.live_state().range_set}
    old = server.http.put("/v1/erasures/World").headers["etag"]

    def send(tag: str = old, request: str = "r-1", path: str = path) -> httpx.Response:
        headers = {"If-Match": tag, "X-Request-ID": request}
        return server.http.request(method, path, json=body, headers=headers)

    first, again = send(), send()
    assert (first.status_code, again.status_code) == (200, 200)
    assert (again.json(), again.headers["etag"]) == (first.json(), first.headers["etag"])
    for other in (send(request="r-2"), send(tag=f"{old}, {old}"), send(path=f"{path}?wait_seconds=9")):
        problem(other, 412, "stale_generation")
    later = server.http.put("/v1/erasures/Business").json()
    assert send().json() == later, "it was made, whatever followed"
    assert [each.action for each in server.service.store.audit(3)].count("set") <= 3
    assert server.service.store.live_state().generation == later["generation"]


@pytest.mark.local
def test_erasure_expires_at_its_time(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(StoreClock, "now", lambda clock: now)
    changed = server.http.put("/v1/erasures/Sports", json={"expires_in": 60}).json()
    assert changed["erasures"][0]["expires_at"] == now + 60
    now += 59
    assert erased(server) == ["Sports"]
    now += 1
    assert erased(server) == []
    until(lambda: server.http.get("/v1/erasures").json()["generation"] != changed["generation"])
    assert server.service.store.audit(1)[0].action == "expire"


def test_enforced_erasure_applies_to_every_request(server: RunningServer) -> None:
    server.http.put("/v1/erasures/Sports", json={"enforced": True})
    answer = server.classify(TEXT, erase=["World"]).json()["erasure"]
    assert [(each["concept"], each["enforced"]) for each in answer["erasures"]] == [("Sports", True), ("World", False)]
    assert server.classify(TEXT, erase=[]).json()["erasure"]["concepts"] == ["Sports"]


def test_invalid_changes_are_rejected(server: RunningServer, problem: Problem) -> None:
    problem(server.http.put("/v1/erasures/Weather"), 404, "unknown_concept")
    problem(server.http.delete("/v1/erasures/Weather"), 404, "unknown_concept")
    problem(server.http.put("/v1/erasures/Sports", json={"layer": 0}), 422, "not_fitted")
    problem(server.http.put("/v1/erasures/Sports", json={"expires_in": 0}), 422, "invalid")
    problem(server.http.put("/v1/erasures/Sports", json={"reason": "x" * 501}), 422, "invalid")
    repeated = {"erasures": [{"concept": "World"}, {"concept": "World"}]}
    problem(server.http.put("/v1/erasures", json=repeated), 422, "invalid_erasure")
    problem(server.http.put("/v1/erasures/Sports?model=another"), 404, "unknown_model")
    problem(server.http.put("/v1/erasures/Sports", json={"model": "another"}), 404, "unknown_model")
    problem(server.http.put("/v1/erasures", json={"erasures": [], "model": "another"}), 404, "unknown_model")
    assert erased(server) == []


@pytest.mark.local
def test_range_set_can_be_activated_and_rolled_back(server: RunningServer, problem: Problem) -> None:
    store = server.service.store
    first = store.live_state().range_set
    second = store.range_sets.publish(*random_ranges(server.model.identity, 5, ("World", "Sports", "Business")))
    listed = server.http.get("/v1/range-sets").json()["range_sets"]
    active = {each["id"]: each["active"] for each in listed}
    assert (active[first], active[second]) == (True, False)
    assert [each["id"] for each in listed if each["id"] in (first, second)] == [second, first], "the newest comes first"
    assert server.http.put("/v1/range-sets/active", json={"id": second}).json()["range_set"] == second
    assert server.classify(TEXT).json()["erasure"]["range_set"] == second
    assert server.http.put("/v1/range-sets/active", json={"id": first}).json()["range_set"] == first
    server.http.put("/v1/erasures/Sci%2FTech")
    problem(server.http.put("/v1/range-sets/active", json={"id": second}), 409, "unresolvable_erasure")
    assert erased(server) == ["Sci/Tech"]
    forced = server.http.put("/v1/range-sets/active", json={"id": second, "force": True}).json()
    assert (forced["range_set"], forced["erasures"]) == (second, [])
    problem(server.http.put("/v1/range-sets/active", json={"id": "0" * 20}), 404, "unknown_range_set")


def test_range_set_of_another_model_is_rejected(server: RunningServer, problem: Problem) -> None:
    foreign, inspect = random_range_set(3)
    published = server.service.store.range_sets.publish(foreign, inspect)
    problem(server.http.put("/v1/range-sets/active", json={"id": published}), 409, "foreign_range_set")
    assert server.http.get("/v1/erasures").json()["range_set"] != published


def test_range_set_with_the_fingerprint_of_an_earlier_version_is_served(server: RunningServer) -> None:
    assert server.model.earlier_fingerprint is not None
    identity = server.model.identity.model_copy(update={"fingerprint": server.model.earlier_fingerprint})
    published = server.service.store.range_sets.publish(*random_ranges(identity, 7))
    assert server.http.put("/v1/range-sets/active", json={"id": published}).status_code == 200
    assert server.classify(TEXT, erase=["Sports"]).json()["erasure"]["range_set"] == published


def test_range_set_of_another_dtype_requires_force_and_readyz_says_so(
    server: RunningServer, fitted: FitResult, problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    published = server.service.store.range_sets.publish(*in_dtype(fitted.range_set, fitted.inspect, "bfloat16"))
    refused = problem(server.http.put("/v1/range-sets/active", json={"id": published}), 409, "dtype_mismatch")
    said = "the range set was fitted in bfloat16, and the model runs in float32"
    assert said in refused["detail"]
    assert server.http.get("/readyz").json()["problem"] is None
    assert server.http.put("/v1/range-sets/active", json={"id": published, "force": True}).status_code == 200
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert said in ready.json()["problem"]
    until(lambda: f"range set {published}: {said}" in caplog.text)


def test_server_reports_its_dtype(server: RunningServer) -> None:
    until(lambda: server.service.store.replicas.read().dtypes == ("float32",))


def test_range_set_has_its_provenance(server: RunningServer) -> None:
    active = server.http.get("/v1/range-sets").json()["active"]
    range_set = server.http.get(f"/v1/range-sets/{active}").json()
    assert range_set["provenance"]["model"]["fingerprint"] == server.service.model.identity.fingerprint
    assert range_set["provenance"]["settings"]["layers"] == [1, 2]


def test_two_servers_of_one_model_agree(server: RunningServer, start_server: Callable[..., RunningServer]) -> None:
    second = start_server(name=server.service.name)
    generation = server.http.put("/v1/erasures/Sports").json()["generation"]
    until(lambda: second.classify(TEXT).json()["erasure"]["generation"] == generation)
    assert erased(second) == ["Sports"]


@pytest.mark.local  # behind a fleet, an engine that missed the last change before Redis stopped must answer 503
def test_without_redis_the_last_snapshot_stays_in_force(
    start_server: Callable[..., RunningServer], fitted: FitResult, problem: Problem, tmp_path: Path
) -> None:
    with connect(None, tmp_path / "redis") as client:
        assert isinstance(client, EmbeddedRedis)
        server = with_ranges(start_server(redis_url=client.url), fitted)
        generation = server.http.put("/v1/erasures/Sports").json()["generation"]
        client.shutdown(nosave=True)
        until(lambda: server.http.get("/readyz").json()["checks"]["store"] is False)
        answer = server.classify(TEXT).json()["erasure"]
        assert (answer["concepts"], answer["generation"]) == (["Sports"], generation)
        rejected = server.http.put("/v1/erasures/World")
        problem(rejected, 503, "store_unavailable")
        assert int(rejected.headers["retry-after"]) >= 1
        problem(server.http.get("/v1/range-sets"), 503, "store_unavailable")
        assert server.http.get("/v1/concepts/Sports/ranges").status_code == 200
        assert server.value("neuronlens_store_up") == 0
        assert erased(server) == ["Sports"]


def test_a_server_whose_clock_is_ahead_ends_no_erasure(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    changed = server.http.put("/v1/erasures/Sports", json={"expires_in": 600}).json()
    assert real() < changed["erasures"][0]["expires_at"] < real() + 1200
    server.service.store.expire(server.service.mirror.now())
    assert erased(server) == ["Sports"]


def test_no_change_is_made_while_a_foreign_range_set_is_active(fresh_server: RunningServer, problem: Problem) -> None:
    """An error must not hide that the change was made all the same."""
    running = fresh_server
    running.http.put("/v1/erasures/Sports").raise_for_status()
    elsewhere = RangeStore(running.service.store.client, running.service.name)
    identity = running.model.identity.model_copy(update={"fingerprint": "ef" * 32})
    state = elsewhere.activate(elsewhere.range_sets.publish(*random_ranges(identity, 0)))
    problem(running.http.put("/v1/erasures/World"), 409, "foreign_range_set")
    problem(running.http.delete("/v1/erasures/Sports"), 409, "foreign_range_set")
    problem(running.http.put("/v1/erasures", json={"erasures": []}), 409, "foreign_range_set")
    assert elsewhere.live_state() == state
    assert erased(running) == ["Sports"], "the last good snapshot stays in force"
