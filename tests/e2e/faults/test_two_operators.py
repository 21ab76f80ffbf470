"""Two operators toggle at once, each on the state that they saw."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx

from range_store.store import RangeStore
from tests.e2e.faults.processes import Served
from tests.processes import Running

ROUNDS = 20


def test_one_wins_one_is_told_and_the_audit_tells_the_order(served: Served, store: RangeStore) -> None:
    first = store.live()
    together = threading.Barrier(2)
    wins: list[tuple[str, str]] = []

    def toggle(who: str, seen: str) -> httpx.Response:
        with httpx.Client(base_url=served.url, timeout=30, trust_env=False) as http:
            http.get("/livez")  # the connection is there
            together.wait()
            change = {"reason": who}
            return http.put(f"/v1/erasures/{who}", json=change, headers={"If-Match": f'"{seen}"'})

    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            seen = served.http.get("/v1/erasures").headers["ETag"].strip('"')
            tried = {who: pool.submit(toggle, who, seen) for who in ("World", "Business")}
            answers = {who: each.result() for who, each in tried.items()}
            assert sorted(each.status_code for each in answers.values()) == [200, 412]
            winner = next(who for who, each in answers.items() if each.status_code == 200)
            loser = next(each for each in answers.values() if each.status_code == 412)
            made = answers[winner].headers["ETag"]
            assert (loser.json()["code"], loser.headers["ETag"]) == ("stale_generation", made)
            assert loser.json()["generation"] == made.strip('"')
            wins.append((winner, made.strip('"')))
    told = Running(["audit", "--limit", str(ROUNDS), "--json", "--url", served.url])
    assert told.end() == 0
    entries = json.loads("".join(told.stdout))
    assert [(each["reason"], each["after"]) for each in reversed(entries)] == wins
    assert entries[-1]["before"] == first.generation
    assert all(late["before"] == early["after"] for late, early in pairwise(entries))
    assert all(early["at"] <= late["at"] for late, early in pairwise(entries))
    listed = served.http.get("/v1/audit", params={"limit": ROUNDS}).json()
    assert (listed["model"], listed["entries"]) == (served.name, entries)
    over = Running(["erase", "on", "World", "--if-match", first.generation, "--url", served.url])
    assert over.end() == 4
    assert "read it again and retry" in over.stderr[-1]
