"""Several server processes on one Redis: some are stopped, killed or told to stop while clients wait for toggles."""

import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from range_store.storage.store import RangeStore
from tests.e2e.faults.processes import TEXTS, RedisProcess, Served
from tests.range_store.waiting import until
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

PATIENT = 60.0
"""Seconds that a toggle may take to reach every replica."""
LONG_LEASE = (
    "from range_store.storage.replicas import ReplicaRegistry; "
    "ReplicaRegistry.report.__defaults__ = (3600.0, None, None)"
)
"""Nobody is forgotten while a test runs, however slow the machine is."""


def toggle(server: Served, on: bool, seconds: float = PATIENT) -> httpx.Response:
    """Switch an erasure, and wait until every replica follows."""
    wait = {"wait": "all", "wait_seconds": str(seconds)}
    return server.http.request("PUT" if on else "DELETE", "/v1/erasures/World", params=wait, timeout=2 * PATIENT)


def generation_of_answer(server: Served) -> str:
    """The generation under which a text is classified."""
    answer = server.http.post("/v1/classify", json={"inputs": TEXTS[0]})
    assert answer.status_code == 200, answer.text
    generation: str = answer.json()["erasure"]["generation"]
    return generation


def replicas(server: Served) -> dict[str, dict[str, Any]]:
    """The live replicas by name."""
    return {each["name"]: each for each in server.http.get("/v1/replicas").json()["replicas"]}


def name_of(server: Served) -> str:
    """The name of a replica."""
    return next(name for name, each in replicas(server).items() if each["this"])


@pytest.fixture
def start_replicas(
    redis_process: RedisProcess, model: LoadedModel, fitted: FitResult
) -> Iterator[Callable[..., list[Served]]]:
    """`start_replicas(2)`: server processes of one model, with an active range set."""
    name = f"replicas-{uuid.uuid4().hex[:8]}"
    with redis_process.client() as client, ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        store = RangeStore(client, name)
        store.activate(store.range_sets.publish(fitted.range_set, fitted.inspect))

        def start(count: int, code: str = "") -> list[Served]:
            options = ("--name", name, "--drain-delay", "3600")
            environment = {"NEURONLENS_REQUEST_TIMEOUT": str(2 * PATIENT), "NEURONLENS_DRAIN_SECONDS": "3600"}
            starting = [
                pool.submit(Served, model.source, redis_process.url, *options, code=code, **environment)
                for _ in range(count)
            ]
            started = [each.result() for each in starting]
            for each in started:
                stack.callback(each.close)
            until(lambda: all(len(replicas(each)) == count for each in started))
            return started

        yield start


def test_toggle_waits_for_every_replica_and_names_those_missing(
    start_replicas: Callable[..., list[Served]],
) -> None:
    one, other = start_replicas(2, LONG_LEASE)
    other_name = name_of(other)
    for server, on in ((one, True), (other, False), (one, True)):
        reply = toggle(server, on)
        assert reply.status_code == 200, reply.text
        assert {generation_of_answer(each) for each in (one, other)} == {reply.json()["generation"]}

    # a process that stands still is named, and follows when it goes on
    other.command.process.send_signal(signal.SIGSTOP)
    try:
        reply = toggle(one, False, 0.5)
        assert (reply.status_code, reply.json()["code"]) == (504, "not_everywhere")
        assert other_name in reply.json()["missing"]
        assert reply.headers["etag"] == f'"{reply.json()["generation"]}"'
        until(lambda: [name for name, each in replicas(one).items() if not each["current"]] == [other_name])
    finally:
        other.command.process.send_signal(signal.SIGCONT)
    assert toggle(one, True).status_code == 200
    assert all(each["current"] for each in replicas(one).values())

    # a process that drains is not waited for, though it still runs
    other.command.process.send_signal(signal.SIGTERM)
    until(lambda: other_name not in replicas(one))
    assert toggle(one, False).status_code == 200
    assert other.command.process.poll() is None


@pytest.mark.full
def test_replicas_that_are_killed_or_paused_for_long_are_forgotten(
    start_replicas: Callable[..., list[Served]],
) -> None:
    """After the time of a lease; a replica that goes on after that reads the live state before it answers."""
    one, paused, killed = start_replicas(3)
    paused_name, killed_name = name_of(paused), name_of(killed)
    paused.command.process.send_signal(signal.SIGSTOP)
    killed.close()
    try:
        assert {paused_name, killed_name} <= set(toggle(one, True, 1).json()["missing"])
        until(lambda: len(replicas(one)) == 1, 120)
        reply = toggle(one, False)
        assert reply.status_code == 200, reply.text
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(generation_of_answer, paused) for _ in range(8)]  # they wait in its sockets
            until(lambda: all(each.running() for each in asked))
            paused.command.process.send_signal(signal.SIGCONT)
            assert {each.result() for each in asked} == {reply.json()["generation"]}
    finally:
        paused.command.process.send_signal(signal.SIGCONT)
    until(lambda: paused_name in replicas(one))
