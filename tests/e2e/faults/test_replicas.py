"""Several server processes on one Redis: some are stopped, killed or told to stop while toggles are waited for."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from range_store.replicas import LEASE_SECONDS
from range_store.store import RangeStore
from tests.e2e.faults.processes import TEXTS, RedisProcess, Served
from tests.range_store.waiting import until
from workers.models.loading import LoadedModel

FORGOTTEN_SECONDS = LEASE_SECONDS + 30
"""Generous: a killed replica is forgotten as soon as its report expires."""


def toggle(served: Served, on: bool, seconds: float) -> httpx.Response:
    waits = {"wait": "all", "wait_seconds": str(seconds)}
    return served.http.request("PUT" if on else "DELETE", "/v1/erasures/World", params=waits)


def answered_under(served: Served) -> str:
    answer = served.http.post("/v1/classify", json={"inputs": TEXTS[0]})
    assert answer.status_code == 200, answer.text
    generation: str = answer.json()["erasure"]["generation"]
    return generation


def replicas(served: Served) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in served.http.get("/v1/replicas").json()["replicas"]}


def name_of(served: Served) -> str:
    return next(name for name, each in replicas(served).items() if each["this"])


@pytest.fixture
def two_more(redis_process: RedisProcess, model: LoadedModel, served: Served) -> Iterator[list[Served]]:
    with ThreadPoolExecutor(2) as pool:
        options = ("--name", served.name, "--drain-delay", "30")
        starting = [pool.submit(Served, model.source, redis_process.url, *options) for _ in range(2)]
        started = [each.result() for each in starting]
    yield started
    for each in started:
        each.close()


def test_toggles_reach_every_process_or_name_it(served: Served, two_more: list[Served], store: RangeStore) -> None:
    paused, killed = two_more
    until(lambda: len(replicas(served)) == 3)
    names = {name_of(each): each for each in (served, paused, killed)}
    assert len(names) == 3
    for step in range(20):
        reply = toggle((served, paused, killed)[step % 3], step % 2 == 0, 20)
        assert reply.status_code == 200, reply.text
        assert {answered_under(each) for each in names.values()} == {reply.json()["generation"]}

    # a process that stands still is named, and follows when it goes on
    paused_name = name_of(paused)
    killed_name = name_of(killed)
    paused.command.process.send_signal(signal.SIGSTOP)
    try:
        reply = toggle(served, True, 4)  # time enough for who lives, and too little for the paused one to be forgotten
        assert (reply.status_code, reply.json()["code"]) == (504, "not_everywhere")
        assert reply.json()["missing"] == [paused_name]
        assert reply.headers["etag"] == f'"{reply.json()["generation"]}"'
        assert not replicas(served)[paused_name]["current"]
    finally:
        paused.command.process.send_signal(signal.SIGCONT)
    assert toggle(served, False, 20).status_code == 200
    assert all(each["current"] for each in replicas(served).values())

    # one that is killed, and one that stands still for longer, are forgotten
    paused.command.process.send_signal(signal.SIGSTOP)
    killed.close()
    try:
        assert set(toggle(served, True, 4).json()["missing"]) == {paused_name, killed_name}
        until(lambda: len(replicas(served)) == 1, FORGOTTEN_SECONDS)
        reply = toggle(served, False, 20)
        assert reply.status_code == 200, reply.text
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(answered_under, paused) for _ in range(8)]  # they wait in its sockets
            until(lambda: any(each.running() for each in asked))
            paused.command.process.send_signal(signal.SIGCONT)
            assert {each.result() for each in asked} == {reply.json()["generation"]}, "it looks before it answers"
    finally:
        paused.command.process.send_signal(signal.SIGCONT)
    until(lambda: paused_name in replicas(served))

    # one that drains is out at once, though it is there and would answer for half a minute
    paused.command.process.send_signal(signal.SIGTERM)
    until(lambda: paused_name not in replicas(served))
    assert toggle(served, True, 20).status_code == 200
    assert paused.command.process.poll() is None
    assert store.live().generation == answered_under(served)
