"""How much a server slows down while it fits: texts per second with and without a fit, side by side.

    NEURONLENS_FIT_THREADS=1 python benchmarks/fit_beside.py --cache-dir DEMO --data train.jsonl --pairs 20

The fit is one job of `POST /v1/fits`, stopped (SIGSTOP) and continued (SIGCONT) between the two halves of each pair, so
that both are of one run, on one machine. Printed are the median ratio of the pairs with its 95 % interval, the medians
themselves, and rows per second of the fit beside the load and alone.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client import Line, Server, ask_all, bodies_of, serving, texts_of

from workers.demo.demo import CORPUS, make_classifier


def call(server: Server, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}")
    request.add_header("Content-Type", "application/json")
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: dict[str, Any] = json.loads(reply.read())
    return answer


def rate(server: Server, bodies: Sequence[bytes], texts: int, connections: int) -> float:
    """Texts per second of answering all of the bodies."""
    started = time.perf_counter()
    asyncio.run(ask_all(server.port, bodies, connections))
    return texts / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, required=True, help="where the demo is, or is to be")
    parser.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="texts to fit and to classify")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--texts", type=int, default=256, help="of one measurement")
    parser.add_argument("--connections", type=int, default=4)
    arguments = parser.parse_args()
    classifier = make_classifier(arguments.cache_dir, lambda *now: None)
    texts = texts_of(arguments.data, arguments.texts)
    large = arguments.cache_dir / "fit-beside.jsonl"
    with large.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts_of(arguments.data, 500_000)):
            file.write(json.dumps({"text": text, "label": str(number % 4)}) + "\n")
    os.environ["NEURONLENS_FIT_DIRS"] = json.dumps([str(arguments.cache_dir.absolute())])
    with serving(classifier, arguments.cache_dir, "--device", "cpu") as server:
        job = call(server, "/v1/fits", {"data": large.name, "layers": "all"})["id"]
        while not ((now := call(server, f"/v1/jobs/{job}"))["progress"] or {}).get("rows_per_second"):
            if now["error"]:
                raise SystemExit(now["error"])
            time.sleep(0.5)
        (lock,) = arguments.cache_dir.glob(f"jobs/*/{job}/lock")
        pid = int(lock.read_text())

        def rows() -> int:
            return int(call(server, f"/v1/jobs/{job}")["progress"]["rows_done"])

        began, first = time.perf_counter(), rows()
        time.sleep(15)
        alone = (rows() - first) / (time.perf_counter() - began)
        beside: list[float] = []
        for per_request in (1, 16):
            bodies = bodies_of(texts, per_request)
            line = Line(f"texts/s with a fit / without, {per_request} texts a request", "as its share of the cores")
            rate(server, bodies, len(texts), arguments.connections)
            for _ in range(arguments.pairs):
                first, began = rows(), time.perf_counter()
                with_fit = rate(server, bodies, len(texts), arguments.connections)
                beside.append((rows() - first) / (time.perf_counter() - began))
                os.kill(pid, signal.SIGSTOP)
                try:
                    without = rate(server, bodies, len(texts), arguments.connections)
                finally:
                    os.kill(pid, signal.SIGCONT)
                line.pairs.append((with_fit, without))
            print(line)
            medians = [statistics.median(each) for each in zip(*line.pairs, strict=True)]
            print(f"    medians: {medians[0]:.0f} with, {medians[1]:.0f} without")
        print(f"rows/s of the fit: {alone:.0f} without load, {statistics.mean(beside):.0f} beside it")
    large.unlink()


if __name__ == "__main__":
    main()
