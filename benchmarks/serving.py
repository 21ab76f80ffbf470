"""Serving speed: ratios in one run, side by side on the same machine (`make bench`).

    python benchmarks/serving.py --cache-dir DEMO --data train.jsonl --pairs 20

Every line is a ratio of two things that were timed one after the other, in interleaved pairs; printed are the median
and its 95 % interval (percentile bootstrap of the median). The server is the demo's classifier behind
`neuronlens serve`, in a process of its own; the load generator is a raw keep-alive HTTP/1.1 client in this process,
whose share of the CPU is printed, since both share the cores. CPU-milliseconds are those of the process that works.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from client import Connection, Line, Server, ask_all, bodies_of, serving, texts_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from workers.demo.demo import CORPUS, make_classifier
from workers.engine.settings import CPU_BATCH_TOKENS
from workers.models.loading import LoadedModel, load_model

LENGTH_BATCH = 32


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


class OwnPass:
    """The engine's own forward pass, offline: packed batches of tokenized texts, and nothing else."""

    def __init__(self, model: LoadedModel, texts: Sequence[str]) -> None:
        self.model = model
        self.encoded = model.tokens.encode(texts)

    def __call__(self) -> list[int]:
        labels = [0] * len(self.encoded)
        for rows, batch in self.model.tokens.batches(self.encoded, CPU_BATCH_TOKENS, self.model.device):
            for row, label in zip(rows, self.model.steered.logits(batch).argmax(dim=-1).tolist(), strict=True):
                labels[row] = label
        return labels


def plans(count: int) -> Iterator[dict[str, object]]:
    """Distinct erasures at the last block, over and over."""
    return itertools.cycle([{"concept": "Sports", "tau": 1 + 0.05 * n, "top_fraction": 0.3} for n in range(count)])


async def toggles(told: Server, other: Server, rounds: int) -> list[float]:
    """Seconds from each `PUT` at one server until the other was last asked and answered under the old generation."""
    operator = await Connection.open(told.port)
    body = json.dumps({"inputs": "A short text."}).encode()
    seen: list[tuple[float, str]] = []
    over = False

    async def user() -> None:
        connection = await Connection.open(other.port)
        while not over:
            reply = await connection.ask(body)
            seen.append((reply.sent, json.loads(reply.body)["erasure"]["generation"]))
        connection.close()

    users = [asyncio.create_task(user()) for _ in range(2)]
    delays = []
    for n in range(rounds):
        await asyncio.sleep(0.05)
        seen.clear()
        reply = await operator.ask(json.dumps({"tau": 1 + n % 7}).encode(), "/v1/erasures/Sports", "PUT")
        generation = json.loads(reply.body)["generation"]
        while len([1 for _, own in seen if own == generation]) < 4:
            await asyncio.sleep(0.002)
        delays.append(max([0.0] + [sent - reply.sent for sent, own in seen if own != generation]))
    over = True
    await asyncio.gather(*users)
    await operator.ask(b"", "/v1/erasures/Sports", "DELETE")
    operator.close()
    return delays


def idle_latency(server: Server, loop: PlainLoop) -> tuple[float, float]:
    """Median milliseconds of one short text at a time: over HTTP, and one pass of the bare model over its token ids."""
    short = json.dumps({"inputs": "A short text.", "erase": []}).encode()
    batch = loop.tokenizer("A short text.", return_tensors="pt")
    served: list[float] = []
    alone: list[float] = []

    async def ask(number: int) -> None:
        connection = await Connection.open(server.port)
        for _ in range(number):
            reply = await connection.ask(short)
            served.append(1000 * (reply.received - reply.sent))
        connection.close()

    for _ in range(10):  # 50 in a row at a time, in turns
        asyncio.run(ask(50))
        for _ in range(50):
            started = time.perf_counter()
            with torch.inference_mode():
                loop.model(**batch).logits.argmax(dim=-1).tolist()
            alone.append(1000 * (time.perf_counter() - started))
    return statistics.median(served), statistics.median(alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="JSONL whose texts are sent")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--toggles", type=int, default=200)
    parser.add_argument("--only", default="", help="measure the claims alone that hold these words")
    parser.add_argument("--compiled", action="store_true", help="also time the engine's pass with compiled blocks")
    parser.add_argument("--compared-texts", type=int, default=2000, help="on which the labels of types are compared")
    parser.add_argument(
        "--cache-dir", type=Path, required=True, help="of a demo that was made: neuronlens demo --cache-dir"
    )
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    texts = texts_of(asked.data, asked.texts)
    model = make_classifier(asked.cache_dir, lambda *now: None)
    loop = PlainLoop(model, torch.float32)
    full = OwnPass(load_model(str(model), device="cpu", dtype="float32"), texts)
    half = OwnPass(load_model(str(model), device="cpu", dtype="bfloat16"), texts)
    threads = ("--threads", str(asked.threads))

    with serving(model, asked.cache_dir, *threads) as server:

        def load(per_request: int, connections: int, **fields: object) -> Callable[[], object]:
            bodies = bodies_of(texts, per_request, **fields)
            return lambda: asyncio.run(ask_all(server.port, bodies, connections))

        some = plans(32)
        many = [json.dumps({"inputs": text, "erase": [next(some)]}).encode() for text in texts]
        one_plan = [next(plans(1))]
        jobs: dict[str, Callable[[], object]] = {
            "plain loop": lambda: loop(texts),
            "64 × 1": load(1, 64, erase=[]),
            "own pass": full,
            "8 × 32": load(32, 8, erase=[]),
            "own pass, bfloat16": half,
            "64 × 1, erased": load(1, 64, erase=one_plan),
            "64 × 1, compared": load(1, 64, erase=one_plan, compare=True),
            "64 × 1, 32 plans": lambda: asyncio.run(ask_all(server.port, many, 64)),
        }
        claims = [
            (Line("64 requests of one text ÷ plain loop", "≥ 0.95"), "64 × 1", "plain loop"),
            (Line("8 requests of 32 texts ÷ plain loop", "≥ 1.1"), "8 × 32", "plain loop"),
            (Line("64 requests of one text ÷ the engine's own pass, offline", "≥ 0.85"), "64 × 1", "own pass"),
            (Line("8 requests of 32 texts ÷ the engine's own pass, offline", "≥ 0.95"), "8 × 32", "own pass"),
            (Line("bfloat16 ÷ float32, own pass", "≥ 1.5"), "own pass, bfloat16", "own pass"),
            (Line("every request erased ÷ none", "≥ 0.98"), "64 × 1, erased", "64 × 1"),
            (Line("compared ÷ not compared", "≥ 0.95"), "64 × 1, compared", "64 × 1, erased"),
            (Line("32 plans in flight ÷ one", "≥ 0.97"), "64 × 1, 32 plans", "64 × 1, erased"),
        ]
        if asked.compiled:
            compiled = OwnPass(load_model(str(model), device="cpu", dtype="float32", compiled=True), texts)
            jobs["own pass, compiled"] = compiled
            claims.append((Line("compiled ÷ not compiled, own pass", "-"), "own pass, compiled", "own pass"))
        claims = [each for each in claims if asked.only in each[0].claim]
        jobs = {name: job for name, job in jobs.items() if any(name in each[1:] for each in claims)}
        for job in jobs.values():
            job()
        here = {"plain loop", "own pass", "own pass, bfloat16", "own pass, compiled"}
        cpu = dict.fromkeys(jobs, 0.0)
        client_cpu = client_wall = 0.0
        for _ in range(asked.pairs):
            rates = {}
            for name, job in jobs.items():
                before, own, started = server.cpu, time.process_time(), time.perf_counter()
                job()
                wall, own = time.perf_counter() - started, time.process_time() - own
                rates[name] = len(texts) / wall
                cpu[name] += own if name in here else server.cpu - before
                if name not in here:
                    client_cpu, client_wall = client_cpu + own, client_wall + wall
            for line, this, that in claims:
                line.pairs.append((rates[this], rates[that]))
        labels = loop(texts)
        answers = asyncio.run(ask_all(server.port, bodies_of(texts, 1, erase=[]), 64))
        names = loop.model.config.id2label
        different = sum(json.loads(a)["results"][0]["label"] != names[n] for a, n in zip(answers, labels, strict=True))
        waits, bare = idle_latency(server, loop)
        with serving(model, asked.cache_dir, *threads) as other:
            delays = np.array(asyncio.run(toggles(server, other, asked.toggles))) * 1000
    more = texts_of(asked.data, asked.compared_texts)
    types = np.mean([a != b for a, b in zip(OwnPass(full.model, more)(), OwnPass(half.model, more)(), strict=True)])
    print(f"{len(texts)} texts of {asked.data.name}, {asked.pairs} pairs, {asked.threads} threads, float32")
    print("median and its 95 % interval:")
    for line, _, _ in claims:
        print(line)
    per_text = asked.pairs * len(texts) / 1000
    print("CPU-ms per text: " + "; ".join(f"{name} {cpu[name] / per_text:.2f}" for name in jobs))
    print(f"load generator: {client_cpu / client_wall:.3f} of one core while it ran")
    print(f"labels that differ from the loop's: {different} of {len(texts)}")
    print(f"labels that bfloat16 changes: {types:.2%} of {len(more)} (≤ 0.2 %)")
    print(f"idle, one short text: {waits:.2f} ms; the bare model {bare:.2f} ms; {waits - bare:.2f} ms more (≤ 3)")
    p50, p99 = np.percentile(delays, [50, 99])
    print(f"a toggle until a second process obeys: p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(delays)} (p99 ≤ 50)")
    print(f"start until ready: {server.started_in:.1f} s (≤ 15)")


if __name__ == "__main__":
    main()
