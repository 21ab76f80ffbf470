"""Make the demo: train once and cache, fit ranges, activate them, measure erasures on held-out sentences."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from range_store.atomic_files import make_private_directory
from range_store.storage.store import RangeStore
from workers.corpora.corpus import Corpus
from workers.corpora.loading import load_corpus
from workers.demo.minilm import SHA256, minilm_directory
from workers.evaluation.evaluate import Evaluation, evaluate
from workers.evaluation.settings import EvaluationSettings
from workers.fitting.fit import fit
from workers.models.loading import LoadedModel, load_model
from workers.training.train import TrainSettings, train

NAME = "demo-news"
CORPUS = Path(__file__).parent / "corpus"
CONCEPTS = ("World", "Sports", "Business", "SciTech")
EPOCHS = 2
LEARNING_RATE = 5e-5
SEED = 0

Report = Callable[[str, int, int], None]
"""Told of progress: (what is being done, how much of it, out of how much)."""


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo made. `accuracy` is the bare model's on the held-out sentences."""

    model: LoadedModel
    range_set: str
    accuracy: float
    evaluation: Evaluation


def make_classifier(directory: Path, report: Report, *, rebuild: bool = False) -> Path:
    """The demo's classifier below `directory`: from the cache, or MiniLM fine-tuned on the demo's corpus.

    The cache knows what it was made from: another corpus, base or recipe makes another classifier.

    Raises:
        DemoError: MiniLM is missing or not the known one.
    """
    recipe = hashlib.sha256(f"{SHA256} {EPOCHS} {LEARNING_RATE} {SEED}".encode())
    recipe.update((CORPUS / "train.jsonl").read_bytes())
    made = directory / f"model-{recipe.hexdigest()[:12]}"
    make_private_directory(directory)
    with FileLock(directory / "model.lock"):
        if rebuild:
            shutil.rmtree(made, ignore_errors=True)
        if not (made / "model.safetensors").is_file():
            base = minilm_directory()
            train(
                str(base),
                corpus("train"),
                None,
                made,
                TrainSettings(epochs=EPOCHS, learning_rate=LEARNING_RATE, seed=SEED),
                overwrite=True,
                progress=lambda now: report("training MiniLM", now.done, now.total),
            )
    return made


def corpus(split: str) -> Corpus:
    """The demo's sentences: "train" or "test"."""
    return load_corpus(str(CORPUS / f"{split}.jsonl"), labels=CONCEPTS)


def prepare(directory: Path, store: RangeStore, report: Report, *, rebuild: bool = False) -> Demo:
    """Everything up to serving: classifier, active range set, table.

    Ranges are fitted anew only if no published range set is of this classifier and corpus. Whatever is erased live
    stays as it was.
    """
    model = load_model(str(make_classifier(directory, report, rebuild=rebuild)), device="cpu", name=NAME)
    learned = corpus("train")
    fitted = [
        published.id
        for published in store.range_sets.list()
        if published.provenance.model.fingerprint == model.identity.fingerprint
        and published.provenance.corpus.sha256 == learned.sha256
        and len(published.provenance.settings.layers) == model.identity.n_layers
    ]
    if fitted and not rebuild:
        chosen = fitted[0]
    else:
        made = fit(model, learned, layers="all", progress=lambda now: report("fitting ranges", now.done, now.total))
        chosen = store.range_sets.publish(made.range_set, made.inspect)
    if store.live_state().range_set != chosen:
        store.activate(chosen, force=True, by="demo", reason="neuronlens demo")
    evaluation = evaluate(
        model,
        store.range_sets.read(chosen),
        corpus("test"),
        EvaluationSettings(top_fractions=(1.0,)),
        progress=lambda now: report("measuring on held-out sentences", now.done, now.total),
    )
    mean = evaluation.rows[-1]
    n_texts = sum(row.n_target for row in evaluation.rows[: len(CONCEPTS)])
    right = sum(row.base_acc * row.n_target for row in evaluation.rows[: len(CONCEPTS)])
    assert mean.target == "mean"
    return Demo(model, chosen, right / n_texts, evaluation)
