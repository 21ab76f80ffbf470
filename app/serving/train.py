"""Trains a classifier. Importing it loads torch."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.serving.inputs import CorpusChoice, NewModelChoice, OnProgress
from app.serving.loading import read_corpus
from workers.corpora.corpus import warn_about_overlap
from workers.fitting.progress import Progress
from workers.models.loading import use_threads
from workers.training.scratch import NewModel
from workers.training.train import Epoch, TrainReport, TrainSettings, train


def train_model(
    base: str | NewModelChoice,
    data: CorpusChoice,
    eval_data: CorpusChoice | None,
    out: Path,
    *,
    threads: int | None,
    overwrite: bool,
    on_progress: OnProgress,
    announce: Callable[[str], None],
    **settings: Any,
) -> TrainReport:
    """Load the corpora, and train.

    Args:
        announce: called with lines that a user should read: where training resumes, and each epoch's result.
        settings: the arguments of `workers.training.train.TrainSettings`.

    Raises:
        CorpusError, ModelError: see `workers.training.train.train`.
    """
    use_threads(threads)
    learned = read_corpus(data, ())
    held_out = read_corpus(eval_data, learned.concepts) if eval_data else None
    if held_out is not None:
        warn_about_overlap(held_out, learned, "--eval-data")
    chosen = TrainSettings(**settings)

    def progress(now: Progress) -> None:
        if now.phase == "training" and now.done == now.resumed + 1:
            resumed = f"resumes at step {now.resumed:,} of {now.total:,}" if now.resumed else "starts"
            announce(f"training {resumed}; after Ctrl-C, the same command resumes it")
        on_progress(now.phase, now.done, now.total)

    def epoch(done: Epoch) -> None:
        announce(f"epoch {done.number} of {chosen.epochs:g}: loss {done.loss:.3f}, accuracy {done.accuracy:.3f}")

    start = base if isinstance(base, str) else NewModel(**asdict(base))
    return train(start, learned, held_out, out, chosen, overwrite=overwrite, progress=progress, epoch=epoch)
