"""Two operators change the live state at once, each based on the state that both saw."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest

from app.cli import run
from tests.servers import RunningServer

ROUNDS = 5


def test_one_of_two_conditional_changes_wins_and_the_audit_keeps_the_order(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = server.service.store.live_state()
    barrier = threading.Barrier(2)
    wins: list[tuple[str, str]] = []

    def toggle(concept: str, seen: str) -> httpx.Response:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            http.get("/livez")  # connect first, so that both changes are sent at once
            barrier.wait()
            change = {"reason": concept}
            return http.put(f"/v1/erasures/{concept}", json=change, headers={"If-Match": f'"{seen}"'})

    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            seen = server.http.get("/v1/erasures").headers["ETag"].strip('"')
            tried = {concept: pool.submit(toggle, concept, seen) for concept in ("World", "Business")}
            answers = {concept: each.result() for concept, each in tried.items()}
            assert sorted(each.status_code for each in answers.values()) == [200, 412]
            winner = next(concept for concept, each in answers.items() if each.status_code == 200)
            loser = next(each for each in answers.values() if each.status_code == 412)
            etag = answers[winner].headers["ETag"]
            assert (loser.json()["code"], loser.headers["ETag"]) == ("stale_generation", etag)
            assert loser.json()["generation"] == etag.strip('"')
            wins.append((winner, etag.strip('"')))
    assert run(["audit", "--limit", str(ROUNDS), "--json", "--url", server.url]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(each["reason"], each["after"]) for each in reversed(entries)] == wins
    assert entries[-1]["before"] == first.generation
    assert all(late["before"] == early["after"] for late, early in pairwise(entries))
    assert all(early["at"] <= late["at"] for late, early in pairwise(entries))
    listed = server.http.get("/v1/audit", params={"limit": ROUNDS}).json()
    assert (listed["model"], listed["entries"]) == (server.service.name, entries)
    assert run(["erase", "on", "World", "--if-match", first.generation, "--url", server.url]) == 4
    assert "read it again and retry" in capsys.readouterr().err
