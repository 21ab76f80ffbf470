"""Work on a Ray cluster of this machine beside one process, each on cores of its own.

    python benchmarks/cluster.py read --data train.jsonl --rows 1000000
    python benchmarks/cluster.py fit --cache-dir DEMO --data train.jsonl --rows 16384 --repeat 3
    python benchmarks/cluster.py serve --cache-dir DEMO --repeat 5
    python benchmarks/cluster.py simulate --replicas 16 64 --rate TEXTS_PER_SECOND

`read`: texts per second of the process that reads a corpus for a fit on a cluster: hashed first, then cut into chunks;
no model works, and starting is left out.

`fit`: texts per second of a fit of the last block in one process, with one actor and with two, each on one thread,
in turn; and in two processes without Ray that know nothing of each other, which is all that two cores of a machine
can do. Printed are the medians and the ratios of each turn. Starting and loading are left out, reading is not, but for
the pass that hashes the corpus first.

`serve`: texts per second of requests of 32 texts, and the latency of one short text, with one process and with replicas
on Ray, in turn. `simulate`: what one ingress and the store carry in front of replicas that sleep for as long as a text
takes; that is an extrapolation, and every line says so. Both: `benchmarks/fleet.py`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from fleet import bench_serving, bench_simulated

from workers.cluster.connection import PRIVATE, connected
from workers.cluster.corpus_files import RayFileTable
from workers.cluster.fitting import fit_on
from workers.cluster.model_pool import ModelPool, PoolLayout
from workers.corpora.loading import load_corpus
from workers.corpora.rows import CHUNK_ROWS
from workers.demo.demo import CORPUS, make_classifier
from workers.fitting.fit import fit
from workers.models.loading import LoadedModel, load_model


def repeated(data: Path, rows: int, where: Path) -> Path:
    """A file of so many rows: those of `data`, again and again."""
    lines = data.read_text("utf-8").splitlines()
    where.write_text("\n".join(islice(cycle(lines), rows)) + "\n", "utf-8")
    return where


def bench_read(data: Path, rows: int) -> None:
    with TemporaryDirectory() as place, connected(PRIVATE, 2):
        small, large = (repeated(data, count, Path(place, f"{count}.jsonl")) for count in (rows // 10, rows))
        size = large.stat().st_size / rows

        def seconds(path: Path) -> tuple[float, float]:
            """To hash, and to cut."""
            started = time.perf_counter()
            corpus = load_corpus(str(path), table=RayFileTable.open(str(path)))
            hashed = time.perf_counter()
            for _ in corpus.chunks(0):
                pass
            return hashed - started, time.perf_counter() - hashed

        seconds(small)  # starts the processes
        for name, few, all_of in zip(("hashed", "cut into chunks"), seconds(small), seconds(large), strict=True):
            print(f"{name}: {(rows - rows // 10) / (all_of - few):.0f} texts/s, of {size:.0f} bytes each")


_model: LoadedModel
"""Of a process that fits by itself."""


def _load(source: str) -> None:
    global _model
    torch.set_num_threads(1)
    _model = load_model(source, device="cpu")


def _fit_alone(path: Path) -> None:
    fit(_model, load_corpus(str(path), labels=_model.identity.labels))


def bench_fit(cache_dir: Path, data: Path, rows: int, repeat: int) -> None:
    source = str(make_classifier(cache_dir, lambda *now: None))
    large, half, small = (
        repeated(data, count, cache_dir / f"cluster-{name}.jsonl")
        for name, count in (("large", rows), ("half", rows // 2), ("small", 2 * CHUNK_ROWS))
    )
    torch.set_num_threads(1)
    model = load_model(source, device="cpu")
    with ExitStack() as stack:
        apart = stack.enter_context(ProcessPoolExecutor(2, get_context("spawn"), _load, (source,)))
        stack.enter_context(connected(PRIVATE, 3))
        one, two = (
            stack.enter_context(ModelPool(source, {"device": "cpu"}, PoolLayout(actors, 1, gpu=False)))
            for actors in (1, 2)
        )

        def ways(path: Path, part: Path) -> dict[str, Callable[[], object]]:
            corpus = load_corpus(str(path), labels=model.identity.labels)
            on_cluster = load_corpus(str(path), table=RayFileTable.open(str(path)), labels=model.identity.labels)
            return {
                "one process": lambda: fit(model, corpus).range_set.id,
                "one actor": lambda: fit_on(one, on_cluster).range_set.id,
                "two actors": lambda: fit_on(two, on_cluster).range_set.id,
                "two processes, half each": lambda: list(apart.map(_fit_alone, (part, part))) and None,
            }

        for way in ways(small, small).values():  # starts and warms everything
            way()
        rates: dict[str, list[float]] = {}
        found = set()
        for _ in range(repeat):
            for name, way in ways(large, half).items():
                started = time.perf_counter()
                found.add(way())
                rates.setdefault(name, []).append(rows / (time.perf_counter() - started))
    assert len(found - {None}) == 1, "range sets differ"
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} texts/s")
    for name, other in (
        ("one actor", "one process"),
        ("two actors", "one actor"),
        ("two processes, half each", "one process"),
        ("two actors", "two processes, half each"),
    ):
        ratios = [first / second for first, second in zip(rates[name], rates[other], strict=True)]
        print(f"{name} ÷ {other}: {statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)})")
    print(json.dumps({name: [round(value, 1) for value in values] for name, values in rates.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fitting = commands.add_parser("fit", help="texts per second of a fit")
    fitting.add_argument("--cache-dir", type=Path, required=True, help="where the demo is, or is to be")
    fitting.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="texts, used again and again")
    fitting.add_argument("--rows", type=int, default=16_384)
    fitting.add_argument("--repeat", type=int, default=3)
    reading = commands.add_parser("read", help="texts per second of reading")
    reading.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="texts, used again and again")
    reading.add_argument("--rows", type=int, default=1_000_000)
    served = commands.add_parser("serve", help="texts per second and latency of serving")
    served.add_argument("--cache-dir", type=Path, required=True, help="where the demo is, or is to be")
    served.add_argument("--repeat", type=int, default=5)
    served.add_argument("--shorts", type=int, default=500, help="short texts whose latency is measured")
    simulated = commands.add_parser("simulate", help="what one ingress and the store carry, with replicas that sleep")
    simulated.add_argument("--replicas", type=int, nargs="+", default=[16, 64])
    simulated.add_argument("--rate", type=float, required=True, help="texts per second of one replica, as of `serve`")
    arguments = parser.parse_args()
    if arguments.command == "read":
        bench_read(arguments.data, arguments.rows)
    elif arguments.command == "fit":
        bench_fit(arguments.cache_dir, arguments.data, arguments.rows, arguments.repeat)
    elif arguments.command == "serve":
        bench_serving(arguments.cache_dir, arguments.repeat, arguments.shorts)
    else:
        bench_simulated(arguments.replicas, arguments.rate)


if __name__ == "__main__":
    main()
