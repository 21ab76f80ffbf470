"""What research costs beside a plain forward pass: ratios, side by side in one run.

    python benchmarks/research.py                      # the demo's sentences, MiniLM with a new head
    python benchmarks/research.py --model DIR --data FILE --rows 2000

Every round times, one after the other, a plain batched forward pass over the texts and the jobs beside it, so that
whatever else the machine does falls on all of them; the medians of the rounds' ratios are printed. Peak memory is that
of processes of their own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from workers.corpora.corpus import Corpus
from workers.corpora.loading import load_corpus
from workers.demo.demo import CORPUS
from workers.demo.minilm import minilm_directory
from workers.evaluation.evaluate import evaluate
from workers.evaluation.measure import batches
from workers.evaluation.settings import EvaluationSettings
from workers.fitting.fit import fit
from workers.models.loading import LoadedModel, load_model, use_threads

SWEEP = {"top_fractions": tuple(n / 10 for n in range(1, 11)), "taus": (1.0, 2.0, 2.5)}


def with_head(directory: Path, labels: int) -> Path:
    """MiniLM with an untrained head for so many labels: costs are those of a trained one."""
    out = directory / f"minilm-{labels}"
    if not out.exists():
        names = {index: f"class {index}" for index in range(labels)}
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_directory(), num_labels=labels, id2label=names, label2id={name: n for n, name in names.items()}
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(minilm_directory()).save_pretrained(out)
    return out


def texts_of(source: Path) -> list[str]:
    return [json.loads(line)["text"] for line in source.read_text("utf-8").splitlines()]


def corpus_of(texts: list[str], rows: int, labels: tuple[str, ...], directory: Path) -> Corpus:
    """`rows` of the texts, over and over, dealt out to the labels in turn."""
    path = directory / f"texts-{rows}-{len(labels)}.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            text = texts[row % len(texts)]
            stream.write(json.dumps({"text": text, "label": labels[row % len(labels)]}) + "\n")
    return load_corpus(str(path), labels=labels)


def plain(model: LoadedModel, corpus: Corpus) -> None:
    """Tokenize, batch by length, and run the bare model: what everything is compared with."""
    for _, batch, *_ in batches(model, corpus, 4096):
        model.steered.logits(batch)


def seconds(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def peak_memory(model: Path, corpus: Path) -> float:
    """Peak resident memory, in MB, of a process that loads the model and fits all of its blocks."""
    program = [sys.executable, __file__, "--child", str(model), str(corpus)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def child(model: str, corpus: str) -> None:
    loaded = load_model(model, device="cpu")
    fit(loaded, load_corpus(corpus, labels=loaded.identity.labels), layers="all")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint of any kind; default: MiniLM with new heads of 4 and of 14 labels")
    parser.add_argument("--data", type=Path, default=CORPUS / "train.jsonl", help="JSONL whose texts are used")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", action="store_true", help="also fit 5,000 and 30,000 rows, each in its own process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    transformers.utils.logging.set_verbosity_error()  # that the heads are new is meant
    transformers.utils.logging.disable_progress_bar()
    use_threads(asked.threads)
    texts = texts_of(asked.data)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        paths = [Path(asked.model)] if asked.model else [with_head(directory, 4), with_head(directory, 14)]
        models = [load_model(str(path), device="cpu") for path in paths]
        corpora = [corpus_of(texts, asked.rows, model.identity.labels, directory) for model in models]
        found = measure(models, corpora, asked.rounds)
        if asked.memory:
            name = paths[0]
            sizes = {rows: directory / f"texts-{rows}-{len(models[0].identity.labels)}.jsonl" for rows in (5000, 30000)}
            for rows in sizes:
                corpus_of(texts, rows, models[0].identity.labels, directory)
            memory = {rows: peak_memory(name, path) for rows, path in sizes.items()}
            found["peak memory of a fit, 30,000 against 5,000 rows"] = memory[30000] / memory[5000]
            for rows, megabytes in memory.items():
                found[f"  MB at {rows} rows"] = megabytes
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{asked.rows} texts of {asked.data.name}, {asked.rounds} rounds, {torch.get_num_threads()} threads; medians")
    for what, value in found.items():
        print(f"{what:78} {value:8.3f}")


def measure(models: list[LoadedModel], corpora: list[Corpus], rounds: int) -> dict[str, float]:
    """Medians of the ratios by what they are of."""
    sets = [fit(model, corpus).range_set for model, corpus in zip(models, corpora, strict=True)]
    model, corpus = models[0], corpora[0]
    n = len(model.identity.labels)
    jobs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, corpus),
        f"both methods, {n} classes": lambda: evaluate(model, sets[0], corpus, EvaluationSettings()),
        "sweep": lambda: evaluate(model, sets[0], corpus, EvaluationSettings(**SWEEP)),  # type: ignore[arg-type]
        "fit, one layer": lambda: fit(model, corpus),
        "fit, all layers": lambda: fit(model, corpus, layers="all"),
    }
    if len(models) > 1:
        more = len(models[1].identity.labels)
        jobs[f"both methods, {more} classes"] = lambda: evaluate(models[1], sets[1], corpora[1], EvaluationSettings())
    for job in jobs.values():  # nothing is measured cold
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(seconds(job))

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    found = {"plain forward pass, rows per second (this machine, now)": len(corpus) / statistics.median(times["plain"])}
    found[f"base + both methods, last block, {n} classes / plain pass (at most 1.15)"] = ratio(
        f"both methods, {n} classes", "plain"
    )
    if len(models) > 1:
        found[f"{more} classes / {n} classes (at most 1.05)"] = ratio(
            f"both methods, {more} classes", f"both methods, {n} classes"
        )
    found["sweep of ten percentages and three τ / plain pass (at most 1.3)"] = ratio("sweep", "plain")
    found["fit of one layer, rows per second / plain pass (at least 0.95)"] = ratio("plain", "fit, one layer")
    found["fit of all layers, rows per second / plain pass (at least 0.90)"] = ratio("plain", "fit, all layers")
    found[f"passes of the released code for this / ours (3·C = {3 * n} passes)"] = (
        3 * n / found[f"base + both methods, last block, {n} classes / plain pass (at most 1.15)"]
    )
    return found


if __name__ == "__main__":
    main()
