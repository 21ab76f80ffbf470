"""What `benchmarks/cluster.py` measures of serving on Ray.

`bench_serving`: real engines, side by side with one process. `bench_simulated`: an ingress and a store in front of
replicas that sleep for as long as a model would take, to see what these two carry on more machines than there are here.
"""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
from client import Connection, Server, ask_all, bodies_of, serving, texts_of

from range_store.domain.range_set import ModelIdentity
from range_store.embedded.connection import EmbeddedRedis, connect
from range_store.storage.mirror import Mirror
from range_store.storage.replicas import new_replica_name
from range_store.storage.store import RangeStore
from workers.cluster.connection import PRIVATE, connected
from workers.cluster.messages import CallReply, PackedAnswer, RemoteRequest
from workers.cluster.replica import ReplicaInfo, ReplicaSettings
from workers.demo.demo import CORPUS, make_classifier
from workers.engine.answers import Answer, Load, TextAnswer
from workers.models.facts import ModelFacts

PER_REQUEST = 32
TEXTS = 1024


def bench_serving(cache_dir: Path, repeat: int, shorts: int) -> float:
    """Prints ratios of texts per second and added latency; gives the texts per second of one process of one thread."""
    classifier = make_classifier(cache_dir, lambda *now: None)
    bodies = bodies_of(texts_of(CORPUS / "train.jsonl", TEXTS), PER_REQUEST, erase=[])
    short = json.dumps({"inputs": "A short text.", "erase": []}).encode()
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nlb-", dir="/tmp")))
        redis = stack.enter_context(connect(None, place / "redis"))
        assert isinstance(redis, EmbeddedRedis)
        stack.enter_context(connected(PRIVATE, 4))
        address = ray.get_runtime_context().gcs_address
        on_ray = ("--ray", address, "--redis-url", redis.url, "--threads", "1")
        servers: dict[str, Server] = {
            "one process, 1 thread": stack.enter_context(_served(classifier, place / "a", "a", "--threads", "1")),
            "one process, 2 threads": stack.enter_context(_served(classifier, place / "b", "b", "--threads", "2")),
            "1 replica, 1 thread": stack.enter_context(_served(classifier, place / "c", "c", *on_ray)),
            "2 replicas, 1 thread": stack.enter_context(
                _served(classifier, place / "d", "d", *on_ray, "--replicas", "2")
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(repeat + 1):
            for name, server in servers.items():
                started = time.perf_counter()
                asyncio.run(ask_all(server.port, bodies, 16))
                if turn:  # the first warms up
                    rates[name].append(TEXTS / (time.perf_counter() - started))
        for name, values in rates.items():
            print(f"{name}: {statistics.median(values):.0f} texts/s, requests of {PER_REQUEST} texts")
        one, two, ray_one, ray_two = rates.values()
        for claim, these, those, target in (
            ("1 replica ÷ one process of 1 thread", ray_one, one, "aim ≥ 0.85"),
            ("2 replicas ÷ one process of 2 threads", ray_two, two, "aim ≥ 0.85"),
            ("2 replicas ÷ 1 replica", ray_two, ray_one, ""),
        ):
            ratios = [this / that for this, that in zip(these, those, strict=True)]
            print(f"{claim}: {statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)}) {target}")
        waits: dict[str, list[float]] = {name: [] for name in servers}
        alone = ("one process, 1 thread", "1 replica, 1 thread")
        for _ in range(10):  # in turns
            for name in alone:
                waits[name] += asyncio.run(_one_by_one(servers[name].port, short, shorts // 10))
        p50 = {name: 1000 * statistics.median(waits[name]) for name in alone}
        for name in alone:
            p99 = 1000 * float(np.percentile(waits[name], 99))
            print(f"one short text, {name}: p50 {p50[name]:.1f} ms, p99 {p99:.1f} ms")
        print(f"added by Ray to one short text: {p50[alone[1]] - p50[alone[0]]:.1f} ms at the median (aim ≤ 8)")
    return statistics.median(one)


def bench_simulated(replicas: Sequence[int], rate: float) -> None:
    """Prints what one ingress and the store carry in front of so many replicas of `rate` texts/s. An extrapolation."""
    bodies = bodies_of(texts_of(CORPUS / "train.jsonl", TEXTS), PER_REQUEST, erase=[])
    for number in replicas:
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nlb-", dir="/tmp")))
            started = time.perf_counter()
            server = stack.enter_context(_ingress(place, number, rate))
            up_in = time.perf_counter() - started
            connections = 4 * number
            sent = bodies * max(1, round(10 * number * rate / TEXTS))
            asyncio.run(ask_all(server.port, bodies, connections))
            before, began = server.cpu, time.perf_counter()
            asyncio.run(ask_all(server.port, sent, connections))
            seconds, used = time.perf_counter() - began, server.cpu - before
            carried, ideal = len(sent) * PER_REQUEST / seconds, number * rate
            print(
                f"extrapolation, {number} replicas that sleep {1000 / rate:.2f} ms a text: {carried:.0f} texts/s of "
                f"{ideal:.0f} ({carried / ideal:.2f}); ingress: {1000 * used / len(sent):.2f} ms of CPU a request of "
                f"{PER_REQUEST} texts, {used / seconds:.2f} cores; up in {up_in:.0f} s"
            )
            waits = sorted(asyncio.run(_toggles(server.port, 100)))
            print(
                f"extrapolation, {number} replicas: PUT /v1/erasures?wait=all p50 {1000 * waits[50]:.0f} ms, "
                f"p99 {1000 * waits[98]:.0f} ms (aim ≤ 200)"
            )


@contextlib.contextmanager
def _served(model: Path, data_dir: Path, name: str, *options: str) -> Iterator[Server]:
    with serving(model, data_dir, "--device", "cpu", *options, name=name) as server:
        yield server


async def _one_by_one(port: int, body: bytes, number: int) -> list[float]:
    connection = await Connection.open(port)
    found = []
    for _ in range(number):
        reply = await connection.ask(body)
        found.append(reply.received - reply.sent)
    connection.close()
    return found


async def _toggles(port: int, number: int) -> list[float]:
    """Seconds of changes that are waited for everywhere. No range set is active, so what changes is nothing at all."""
    connection = await Connection.open(port)
    found = []
    for _ in range(number):
        reply = await connection.ask(b'{"erasures": []}', "/v1/erasures?wait=all", "PUT")
        if reply.status != 200:
            raise RuntimeError(reply.body.decode())
        found.append(reply.received - reply.sent)
        await asyncio.sleep(0.02)
    connection.close()
    return found


class Sleeper:
    """A replica without a model: its mirror is real; texts take `settings.model["seconds"]` each, one after another."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings
        self._facts = ModelFacts(**{**settings.model["facts"], "identity": ModelIdentity(**settings.model["identity"])})
        self._name = new_replica_name()
        self._free_at = 0.0
        store = RangeStore(connect(**settings.redis, directory=Path()), settings.name)
        self._mirror = Mirror(store, self._facts.identity.fingerprint, poll=settings.poll_seconds, replica=self._name)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        if config.get("fingerprint"):
            await asyncio.to_thread(self._mirror.start)

    async def info(self) -> ReplicaInfo:
        return ReplicaInfo(self._settings, self._facts, 1024, None)

    async def classify(self, requests: Sequence[RemoteRequest]) -> CallReply:
        texts = sum(len(each.texts) for each in requests)
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + texts * self._settings.model["seconds"]
        await asyncio.sleep(self._free_at - now)
        snapshot = self._mirror.snapshot
        generation = snapshot.live.generation if snapshot else None
        logits = np.zeros(4, np.float32)
        answers = tuple(
            PackedAnswer.of(
                Answer(
                    tuple(TextAnswer(logits, None, 0, False, 20) for _ in each.texts),
                    "none", (), frozenset(), None, generation,
                )
            )
            for each in requests
        )  # fmt: skip
        return CallReply(self._name, answers, Load(0, None, 0.0))

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {}


@contextlib.contextmanager
def _ingress(place: Path, replicas: int, rate: float) -> Iterator[Server]:
    command = [sys.executable, __file__, str(place), str(replicas), str(rate)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving ")), "")
        if not line:
            raise SystemExit("the ingress did not start")
        yield Server(process, int(line.rsplit(":", 1)[1]), time.perf_counter() - started)
    finally:
        process.terminate()
        process.wait()


def _run_ingress(place: Path, replicas: int, rate: float) -> None:
    """In a process of its own: the ingress of a private cluster of sleepers."""
    from app.cli.serve import serve_until_signal
    from app.http.server import bind
    from app.serving import fleet as wiring
    from app.serving.service import engine_limits
    from app.settings import Settings
    from workers.cluster.launching import running_fleet
    from workers.cluster.plan import FleetPlan

    identity = ModelIdentity(
        id="sleepers", revision=None, kind="sequence-classification", family="bert", fingerprint="0" * 64,
        labels=("World", "Sports", "Business", "SciTech"), n_layers=6, hidden_size=384,
    )  # fmt: skip
    facts = ModelFacts(identity, None, "float32", "cpu", "sleepers", 512, True)
    settings = Settings(ray=PRIVATE, model="sleepers", data_dir=place, port=0, replicas=replicas, request_timeout=600)
    with connect(**settings.redis) as client, connected(PRIVATE, replicas):
        assert isinstance(client, EmbeddedRedis)
        told = {**asdict(facts), "identity": None}
        model = {"facts": told, "identity": identity.model_dump(), "seconds": 1 / rate}
        engine = {"max_batch_tokens": 1024, **engine_limits(settings)}
        own = ReplicaSettings("sleepers", model, 1, {"url": client.url}, engine, settings.poll_seconds)
        plan = FleetPlan(own, replicas, None, 0.01, 0.0, 5, replica_class=Sleeper)
        with (
            running_fleet(plan, keep=False) as fleet,
            wiring._service(settings, fleet, client, wiring._End(1)) as service,
            bind(settings) as bound,
        ):
            serve_until_signal([service], settings, bound)


if __name__ == "__main__":
    _run_ingress(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
