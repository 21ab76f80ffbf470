"""Serving speed: ratios in one run, against a plain Hugging Face loop on the same machine (`make bench`).

    python benchmarks/serving.py --data train.jsonl --pairs 20

Every line is a ratio of two things that were timed one after the other, in interleaved pairs; printed are the median
and its 95 % interval (percentile bootstrap of the median). The server is the demo's classifier behind
`neuronlens serve`, in a process of its own; the load generator is a raw keep-alive HTTP/1.1 client in this process,
whose share of the CPU is printed, since both share the cores. CPU-milliseconds are those of the server's process.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from workers.demo.demo import CORPUS, make_classifier

LENGTH_BATCH = 32
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
HERE = Path(sys.executable).parent


class PlainLoop:
    """What a careful user writes: batches of 32 sorted by length, padded, `torch.inference_mode`."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).eval()

    def __call__(self, texts: Sequence[str]) -> list[int]:
        ids = self.tokenizer(list(texts), truncation=True, max_length=512)["input_ids"]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        labels = [0] * len(texts)
        with torch.inference_mode():
            for start in range(0, len(order), LENGTH_BATCH):
                rows = order[start : start + LENGTH_BATCH]
                batch = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
                for row, label in zip(rows, self.model(**batch).logits.argmax(dim=-1).tolist(), strict=True):
                    labels[row] = label
        return labels


class Client:
    """Keep-alive connections that send prepared bodies as fast as they are answered."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def run(self, bodies: Sequence[bytes], connections: int) -> list[bytes]:
        """Answers in the order of the bodies."""
        answers = [b""] * len(bodies)
        queue = iter(enumerate(bodies))

        async def worker() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                for index, body in queue:
                    writer.write(HEAD % len(body) + body)
                    status = await reader.readuntil(b"\r\n\r\n")
                    if not status.startswith(b"HTTP/1.1 200"):
                        raise RuntimeError(status.decode(errors="replace"))
                    fields = status.lower().split(b"\r\n")
                    length = next(each for each in fields if each.startswith(b"content-length:"))[15:]
                    answers[index] = await reader.readexactly(int(length))
            finally:
                writer.close()

        await asyncio.gather(*(worker() for _ in range(connections)))
        return answers


@dataclass
class Server:
    """`neuronlens serve` in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    started_in: float

    @property
    def cpu(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def serving(model: Path, data_dir: Path, *options: str) -> Iterator[Server]:
    command = [str(HERE / "neuronlens"), "serve", "--model", str(model), "--name", "demo-news", "--port", "0"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--data-dir", str(data_dir), *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving ")), "")
        if not line:
            raise SystemExit("the server did not start: try `neuronlens serve` by hand")
        yield Server(process, int(line.rsplit(":", 1)[1]), time.perf_counter() - started)
    finally:
        process.terminate()
        process.wait()


@dataclass
class Line:
    """One claim: how often per second, in pairs of (this, that)."""

    claim: str
    target: str
    pairs: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        ratios = np.array([this / that for this, that in self.pairs])
        rng = np.random.default_rng(0)
        medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        return f"{self.claim:72} {np.median(ratios):6.3f}  [{low:.3f}, {high:.3f}]  {self.target}"


def bodies_of(texts: Sequence[str], per_request: int, **fields: object) -> list[bytes]:
    found = []
    for start in range(0, len(texts), per_request):
        inputs = texts[start : start + per_request]
        found.append(json.dumps({"inputs": inputs[0] if per_request == 1 else list(inputs), **fields}).encode())
    return found


def plans(count: int) -> Iterator[dict[str, object]]:
    """Distinct erasures at the last block, over and over."""
    return itertools.cycle([{"concept": "Sports", "tau": 1 + 0.05 * n, "top_fraction": 0.3} for n in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="JSONL whose texts are sent")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cache-dir", type=Path, required=True, help="of a demo that was made: neuronlens demo --cache-dir"
    )
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    lines = asked.data.read_text("utf-8").splitlines()
    texts = [json.loads(lines[n % len(lines)])["text"] for n in range(asked.texts)]
    model = make_classifier(asked.cache_dir, lambda *now: None)
    loop = PlainLoop(model, torch.float32)
    threads = ("--threads", str(asked.threads))

    def timed(job: Callable[[], object]) -> float:
        started = time.perf_counter()
        job()
        return len(texts) / (time.perf_counter() - started)

    with serving(model, asked.cache_dir, *threads) as server:
        client = Client(server.port)

        def load(per_request: int, connections: int, **fields: object) -> Callable[[], object]:
            bodies = bodies_of(texts, per_request, **fields)
            return lambda: asyncio.run(client.run(bodies, connections))

        def many_plans() -> Callable[[], object]:
            some = plans(32)
            bodies = [json.dumps({"inputs": text, "erase": [next(some)]}).encode() for text in texts]
            return lambda: asyncio.run(client.run(bodies, 64))

        one_plan = [next(plans(1))]
        jobs: dict[str, Callable[[], object]] = {
            "loop": lambda: loop(texts),
            "64 × 1": load(1, 64, erase=[]),
            "8 × 32": load(32, 8, erase=[]),
            "64 × 1, erased": load(1, 64, erase=one_plan),
            "64 × 1, compared": load(1, 64, erase=one_plan, compare=True),
            "64 × 1, 32 plans": many_plans(),
        }
        claims = [
            (Line("64 requests of one text ÷ plain loop", "≥ 0.95"), "64 × 1", "loop"),
            (Line("8 requests of 32 texts ÷ plain loop", "≥ 1.1"), "8 × 32", "loop"),
            (Line("every request erased ÷ none", "≥ 0.98"), "64 × 1, erased", "64 × 1"),
            (Line("compared ÷ not compared", "≥ 0.95"), "64 × 1, compared", "64 × 1, erased"),
            (Line("32 plans in flight ÷ one", "≥ 0.97"), "64 × 1, 32 plans", "64 × 1, erased"),
        ]
        for job in jobs.values():
            job()
        cpu = dict.fromkeys(jobs, 0.0)
        own_cpu, wall = time.process_time(), time.perf_counter()
        loop_cpu = 0.0
        for _ in range(asked.pairs):
            rates = {}
            for name, job in jobs.items():
                before, own = server.cpu, time.process_time()
                rates[name] = timed(job)
                cpu[name] += server.cpu - before
                if name == "loop":
                    loop_cpu += time.process_time() - own
            for line, this, that in claims:
                line.pairs.append((rates[this], rates[that]))
        client_share = (time.process_time() - own_cpu - loop_cpu) / (time.perf_counter() - wall)
        labels = loop(texts)
        answers = asyncio.run(client.run(bodies_of(texts, 1, erase=[]), 64))
        names = loop.model.config.id2label
        different = sum(json.loads(a)["results"][0]["label"] != names[n] for a, n in zip(answers, labels, strict=True))
        short = json.dumps({"inputs": "A short text.", "erase": []}).encode()
        alone: list[float] = []
        served: list[float] = []
        for _ in range(10):  # 50 in a row at a time, in turns
            started = time.perf_counter()
            asyncio.run(client.run([short] * 50, 1))
            between = time.perf_counter()
            for _ in range(50):
                loop(["A short text."])
            served.append((between - started) / 50)
            alone.append((time.perf_counter() - between) / 50)
        print(f"{len(texts)} texts of {asked.data.name}, {asked.pairs} pairs, {asked.threads} threads, float32")
        print("median and its 95 % interval:")
        for line, _, _ in claims:
            print(line)
        per_text = asked.pairs * len(texts) / 1000
        used = "; ".join(f"{name} {cpu[name] / per_text:.2f}" for name in jobs if name != "loop")
        print(f"CPU-ms per text: plain loop {loop_cpu / per_text:.2f}; server: {used}")
        print(f"load generator: {client_share:.3f} of one core on average")
        print(f"labels that differ from the loop's: {different} of {len(texts)}")
        waits, bare = 1000 * statistics.median(served), 1000 * statistics.median(alone)
        print(
            f"idle, one short text at a time: {waits:.2f} ms; the bare model {bare:.2f} ms; {waits - bare:.2f} ms more"
        )
        print(f"start until ready: {server.started_in:.1f} s")


if __name__ == "__main__":
    main()
