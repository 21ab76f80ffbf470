"""How long a toggle takes until it is in force on every one of N server processes (`?wait=all`).

    python benchmarks/wait_all.py --cache-dir DEMO --replicas 4

The servers share the private Redis of the demo, and all cores of the machine. Toggles come one after the other, each to
the next server; after each reply every server is asked for one answer, which must be under that generation or a later
one. A plain toggle of the same servers is timed beside it. Then Redis's own counters tell what a replica costs it that
has nothing to do, and what a plain toggle does, which does not depend on how busy the machine is.
"""

import argparse
import asyncio
import contextlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import redis
from client import Connection, serving

from range_store.domain.live import is_at_least
from range_store.embedded.connection import connect
from range_store.storage.replicas import SILENT_SECONDS
from workers.demo.demo import make_classifier

IDLE_SECONDS, TOGGLES = 20.0, 50


async def toggles(ports: list[int], number: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each toggle that was waited for, and of each that was not."""
    connections = [await Connection.open(port) for port in ports]
    waited: list[float] = []
    plain: list[float] = []
    for n in range(number):
        for own, query in ((waited, "?wait=all&wait_seconds=30"), (plain, "")):
            body = json.dumps({"tau": 1 + n % 7}).encode()
            reply = await connections[n % len(ports)].ask(body, f"/v1/erasures/Sports{query}", "PUT")
            assert reply.status == 200, reply.body
            own.append(1000 * (reply.received - reply.sent))
            if own is plain:
                continue
            made = json.loads(reply.body)["generation"]
            for connection in connections:
                answer = await connection.ask(b'{"inputs": "the keeper saved a penalty"}')
                assert is_at_least(json.loads(answer.body)["erasure"]["generation"], made), "not everywhere"
    await connections[0].ask(b"", "/v1/erasures/Sports", "DELETE")
    for connection in connections:
        connection.close()
    return waited, plain


def asked_of(store: redis.Redis) -> Counter[str]:
    """Commands that Redis has run so far, by name; those inside scripts too."""
    stats: dict[str, Any] = store.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()})


def told(commands: Counter[str], each: float) -> str:
    some = {name: number / each for name, number in commands.most_common() if number / each >= 0.05}
    return f"{sum(some.values()):.1f} ({', '.join(f'{name} {number:.1f}' for name, number in some.items())})"


async def plain_toggles(port: int, number: int) -> None:
    connection = await Connection.open(port)
    for n in range(number):
        reply = await connection.ask(json.dumps({"tau": 1 + n % 7}).encode(), "/v1/erasures/Sports", "PUT")
        assert reply.status == 200, reply.body
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, required=True, help="of a demo that was made")
    parser.add_argument("--replicas", type=int, default=3, help="server processes")
    parser.add_argument("--toggles", type=int, default=300)
    asked = parser.parse_args()
    model = make_classifier(asked.cache_dir, lambda *now: None)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(serving(model, asked.cache_dir, "--threads", "1")) for _ in range(asked.replicas)
        ]
        time.sleep(SILENT_SECONDS)  # where there were none before, nobody can know sooner who reports
        waited, plain = asyncio.run(toggles([server.port for server in servers], asked.toggles))
        store = stack.enter_context(connect(None, asked.cache_dir / "redis"))
        before, began = asked_of(store), time.monotonic()
        time.sleep(IDLE_SECONDS)
        idle, seconds = asked_of(store) - before, time.monotonic() - began
        before, began = asked_of(store), time.monotonic()
        asyncio.run(plain_toggles(servers[0].port, TOGGLES))
        toggled, share = asked_of(store) - before, (time.monotonic() - began) / seconds
        toggled -= Counter({name: round(number * share) for name, number in idle.items()})
    for name, own in (("wait=all", waited), ("plain", plain)):
        p50, p99 = np.percentile(own, [50, 99])
        took = f"p50 {p50:5.1f} ms, p99 {p99:5.1f} ms, worst {max(own):5.1f} ms of {len(own)}"
        print(f"{asked.replicas} replicas, {name:8} {took}")
    print(f"Redis commands of an idle replica a second: {told(idle, asked.replicas * seconds)}")
    print(f"Redis commands of a plain toggle with {asked.replicas} replicas: {told(toggled, TOGGLES)}")


if __name__ == "__main__":
    main()
