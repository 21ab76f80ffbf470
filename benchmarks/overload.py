"""What the server does with four times what it can take, and how others fare while it is busy (`make bench`).

    python benchmarks/overload.py --cache-dir DEMO --data train.jsonl --seconds 20

First the peak: 64 connections that send the next text as soon as the last one is answered. Then four times that many
requests a second, sent when their time has come, whether earlier ones are answered or not. Goodput is texts answered a
second; the time of an accepted request is bounded by what may wait (`--queue-seconds`). Last, while requests of many
texts keep the engine busy, probes, metrics and toggles are timed, one at a time. The load generator shares the cores
with the server; its share is printed.
"""

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from client import Connection, Reply, Server, ask_all, bodies_of, serving, texts_of

from workers.demo.demo import CORPUS, make_classifier

OVERLOAD = 4


async def open_loop(port: int, bodies: Sequence[bytes], per_second: float, seconds: float) -> list[Reply]:
    """Replies to requests that are sent at that rate, each on a connection that is free."""
    free: list[Connection] = []
    replies: list[Reply] = []

    async def ask(body: bytes) -> None:
        while free:
            connection = free.pop()
            try:
                replies.append(await connection.ask(body))
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                if getattr(error, "partial", b""):
                    raise  # in the middle of an answer; one that was idle for long may be closed by the server
            else:
                free.append(connection)
                return
        connection = await Connection.open(port)
        replies.append(await connection.ask(body))
        free.append(connection)

    source = itertools.cycle(bodies)
    started = time.monotonic()
    tasks = set()
    for n in range(int(per_second * seconds)):
        wait = started + n / per_second - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.add(task := asyncio.create_task(ask(next(source))))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return replies


async def others_while_busy(port: int, bodies: Sequence[bytes], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of probes, metrics and toggles, while 4 connections keep sending large requests."""
    end = time.monotonic() + seconds
    source = itertools.cycle(bodies)

    async def user() -> None:
        connection = await Connection.open(port)
        while time.monotonic() < end:
            assert (await connection.ask(next(source))).status == 200
        connection.close()

    users = [asyncio.create_task(user()) for _ in range(4)]
    operator = await Connection.open(port)
    taken: dict[str, list[float]] = {"GET /livez": [], "GET /metrics": [], "PUT /v1/erasures/Sports": []}
    for n in itertools.count():
        for call, own in taken.items():
            verb, path = call.split(" ")
            reply = await operator.ask(json.dumps({"tau": 1 + n % 7}).encode() if verb == "PUT" else b"", path, verb)
            assert reply.status == 200
            own.append(1000 * (reply.received - reply.sent))
        if time.monotonic() > end:
            break
        await asyncio.sleep(0.02)
    await asyncio.gather(*users)
    await operator.ask(b"", "/v1/erasures/Sports", "DELETE")
    operator.close()
    return taken


def peak(server: Server, bodies: Sequence[bytes]) -> float:
    """Texts a second of 64 requests of one text at a time."""
    started = time.perf_counter()
    asyncio.run(ask_all(server.port, bodies, 64))
    return len(bodies) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="JSONL whose texts are sent")
    parser.add_argument("--seconds", type=float, default=20, help="of overload, and of busy times")
    parser.add_argument("--rounds", type=int, default=3, help="peak and overload are measured in turns, so often")
    parser.add_argument("--queue-seconds", type=float, default=5, help="NEURONLENS_MAX_QUEUE_SECONDS of the server")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache-dir", type=Path, required=True, help="of a demo that was made")
    asked = parser.parse_args()
    texts = texts_of(asked.data, 512)
    model = make_classifier(asked.cache_dir, lambda *now: None)
    ones, many = bodies_of(texts, 1, erase=[]), bodies_of(texts, 64, erase=[])
    os.environ["NEURONLENS_MAX_QUEUE_SECONDS"] = str(asked.queue_seconds)
    ratios, accepted, refused = [], [], []
    with serving(model, asked.cache_dir, "--threads", str(asked.threads)) as server:
        peak(server, ones)
        cpu = wall = 0.0
        for _ in range(asked.rounds):
            most = peak(server, ones)
            started, own = time.perf_counter(), time.process_time()
            replies = asyncio.run(open_loop(server.port, ones, OVERLOAD * most, asked.seconds))
            cpu, wall = cpu + time.process_time() - own, wall + time.perf_counter() - started
            good = [reply for reply in replies if reply.status == 200]
            assert {reply.status for reply in replies} <= {200, 429}
            taken = max(reply.received for reply in replies) - min(reply.sent for reply in replies)
            ratios.append(len(good) / taken / most)
            accepted += [reply.received - reply.sent for reply in good]
            refused += [reply.received - reply.sent for reply in replies if reply.status == 429]
        busy = asyncio.run(others_while_busy(server.port, many, asked.seconds))
    print(f"{asked.threads} threads, {asked.rounds} rounds of {asked.seconds:g} s at {OVERLOAD} times the peak")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"goodput ÷ peak: median {np.median(ratios):.3f}, {spread} (≥ 0.9)")
    p50, p99 = np.percentile(accepted, [50, 99])
    print(f"accepted: {len(accepted)}; p50 {p50:.2f} s, p99 {p99:.2f} s, where {asked.queue_seconds:g} s may wait")
    p50, p99 = 1000 * np.percentile(refused, [50, 99])
    print(f"refused (429): {len(refused)}; p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"load generator: {cpu / wall:.3f} of one core while it ran")
    print("while 4 requests of 64 texts are in flight (≤ 50 ms):")
    for call, waits in busy.items():
        p50, p99 = np.percentile(waits, [50, 99])
        print(f"  {call:26} p50 {p50:5.1f} ms, p99 {p99:5.1f} ms, worst {max(waits):5.1f} ms of {len(waits)}")


if __name__ == "__main__":
    main()
