"""This server beside others on one machine: ratios of texts per second, in interleaved pairs (`make bench-rivals`).

    python benchmarks/rivals.py --cache-dir DEMO --infinity VENV --litserve VENV

Each serves the demo's classifier in float32 with the same threads, and cuts texts at 512 tokens. All run all the time,
one is asked at a time. `--infinity` and `--litserve` are virtual environments that hold infinity-emb and litserve;
without one, that server is left out. The third is FastAPI with a transformers pipeline in each request
(`rivals/pipeline.py`).
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from client import Line, ask_all, bodies_of, serving, texts_of

from workers.demo.demo import CORPUS, make_classifier

RIVALS = Path(__file__).parent / "rivals"
START_SECONDS = 120


@contextlib.contextmanager
def running(command: list[str], threads: int, check: bytes) -> Iterator[int]:
    """A server started by `command`, in which PORT stands for a free port; ready when it answers `check`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [part.replace("PORT", str(port)) for part in command],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # LitServe leaves processes of its own behind
        )
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError, RuntimeError, asyncio.IncompleteReadError):
                    asyncio.run(ask_all(port, [check], 1, "/classify"))
                    break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(
                        f"{' '.join(command)} did not start:\n{log.read().decode(errors='replace')[-2000:]}"
                    )
                time.sleep(0.5)
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="JSONL whose texts are sent")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--infinity", type=Path, help="virtual environment with infinity-emb[torch,server]")
    parser.add_argument("--litserve", type=Path, help="virtual environment with litserve and transformers")
    parser.add_argument("--cache-dir", type=Path, required=True, help="of a demo that was made")
    asked = parser.parse_args()
    texts = texts_of(asked.data, asked.texts)
    model = make_classifier(asked.cache_dir, lambda *now: None)
    threads = str(asked.threads)
    ones, many = [[text] for text in texts], [texts[n : n + 32] for n in range(0, len(texts), 32)]

    def bodies(field: str, batches: list[list[str]]) -> list[bytes]:
        return [json.dumps({field: batch}).encode() for batch in batches]

    def load(port: int, requests: list[bytes], connections: int, path: str = "/classify") -> Callable[[], object]:
        return lambda: asyncio.run(ask_all(port, requests, connections, path))

    with contextlib.ExitStack() as stack:
        own = stack.enter_context(serving(model, asked.cache_dir, "--threads", threads)).port
        ours = {
            "64 × 1": load(own, bodies_of(texts, 1, erase=[]), 64, "/v1/classify"),
            "8 × 32": load(own, bodies_of(texts, 32, erase=[]), 8, "/v1/classify"),
        }
        claims: list[tuple[Line, str, Callable[[], object]]] = []

        def compare(name: str, target: str, shape: str, port: int, requests: list[bytes]) -> None:
            connections = 64 if shape == "64 × 1" else 8
            claims.append((Line(f"{shape} ÷ {name}", target), shape, load(port, requests, connections)))

        if asked.infinity:
            command = [str(asked.infinity / "bin/infinity_emb"), "v2", "--model-id", str(model), "--engine", "torch"]
            command += ["--device", "cpu", "--no-bettertransformer", "--host", "127.0.0.1", "--port", "PORT"]
            port = stack.enter_context(running(command, asked.threads, bodies("input", [["a"]])[0]))
            compare("infinity-emb", "≥ 1.8", "64 × 1", port, bodies("input", ones))
            compare("infinity-emb", "≥ 1.8", "8 × 32", port, bodies("input", many))
        script = [sys.executable, str(RIVALS / "pipeline.py"), str(model), "PORT", threads]
        port = stack.enter_context(running(script, asked.threads, bodies("inputs", [["a"]])[0]))
        compare("FastAPI and a pipeline", "≥ 2.0", "64 × 1", port, bodies("inputs", ones))
        if asked.litserve:
            script = [str(asked.litserve / "bin/python"), str(RIVALS / "lit.py"), str(model), "PORT", threads, "1"]
            port = stack.enter_context(running(script, asked.threads, bodies("inputs", [["a"]])[0]))
            compare("LitServe, batches of 32", "≥ 1.6", "64 × 1", port, bodies("inputs", ones))

        def rate(job: Callable[[], object]) -> float:
            started = time.perf_counter()
            job()
            return len(texts) / (time.perf_counter() - started)

        for line, shape, rival in claims:  # warm
            rival()
            ours[shape]()
            line.pairs.clear()
        for _ in range(asked.pairs):
            for line, shape, rival in claims:
                line.pairs.append((rate(ours[shape]), rate(rival)))
        print(f"{len(texts)} texts of {asked.data.name}, {asked.pairs} pairs, {threads} threads, float32")
        print("texts per second, this server ÷ the other: median and its 95 % interval")
        for line, _, _ in claims:
            print(line)


if __name__ == "__main__":
    main()
