"""Makes the demo: trains a classifier and caches it, fits ranges, activates them, and measures erasures."""

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

OnProgress = Callable[[str, int, int], None]
"""Called with the phase, the amount done and the total."""


@dataclass(frozen=True, eq=False)
class Demo:
    """The demo. accuracy: of the unmasked model on the held-out sentences."""

    model: LoadedModel
    range_set: str
    accuracy: float
    evaluation: Evaluation


def make_classifier(directory: Path, on_progress: OnProgress, *, rebuild: bool = False) -> Path:
    """The demo's classifier in a directory below `directory`: a cached one, or MiniLM fine-tuned on the demo's corpus.

    The name of the directory depends on corpus, base and recipe, so a change of these makes a new classifier.

    Raises:
        DemoError: MiniLM is missing or not the expected one.
    """
    recipe = hashlib.sha256(f"{SHA256} {EPOCHS} {LEARNING_RATE} {SEED}".encode())
    recipe.update((CORPUS / "train.jsonl").read_bytes())
    classifier = directory / f"model-{recipe.hexdigest()[:12]}"
    make_private_directory(directory)
    with FileLock(directory / "model.lock"):
        if rebuild:
            shutil.rmtree(classifier, ignore_errors=True)
        if not (classifier / "model.safetensors").is_file():
            base = minilm_directory()
            train(
                str(base),
                corpus("train"),
                None,
                classifier,
                TrainSettings(epochs=EPOCHS, learning_rate=LEARNING_RATE, seed=SEED),
                overwrite=True,
                progress=lambda now: on_progress("training MiniLM", now.done, now.total),
            )
    return classifier


def corpus(split: str) -> Corpus:
    """The demo's sentences. split: "train" or "test"."""
    return load_corpus(str(CORPUS / f"{split}.jsonl"), labels=CONCEPTS)


def prepare(directory: Path, store: RangeStore, on_progress: OnProgress, *, rebuild: bool = False) -> Demo:
    """Make everything that the demo serves: classifier, active range set and table.

    Ranges are fitted only if no published range set is of this classifier and corpus. Live erasures do not change.
    """
    model = load_model(str(make_classifier(directory, on_progress, rebuild=rebuild)), device="cpu", name=NAME)
    train_texts = corpus("train")
    published_ids = [
        published.id
        for published in store.range_sets.list()
        if published.provenance.model.fingerprint == model.identity.fingerprint
        and published.provenance.corpus.sha256 == train_texts.sha256
        and len(published.provenance.settings.layers) == model.identity.n_layers
    ]
    if published_ids and not rebuild:
        range_set = published_ids[0]
    else:
        fitted = fit(
            model, train_texts, layers="all", progress=lambda now: on_progress("fitting ranges", now.done, now.total)
        )
        range_set = store.range_sets.publish(fitted.range_set, fitted.inspect)
    if store.live_state().range_set != range_set:
        store.activate(range_set, force=True, by="demo", reason="neuronlens demo")
    evaluation = evaluate(
        model,
        store.range_sets.read(range_set),
        corpus("test"),
        EvaluationSettings(top_fractions=(1.0,)),
        progress=lambda now: on_progress("measuring on held-out sentences", now.done, now.total),
    )
    rows = evaluation.rows[: len(CONCEPTS)]
    correct = sum(row.base_acc * row.n_target for row in rows)
    return Demo(model, range_set, correct / sum(row.n_target for row in rows), evaluation)
