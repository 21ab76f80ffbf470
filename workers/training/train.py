"""One training run with the transformers Trainer, which resumes from its last checkpoint."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import transformers
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from workers.corpora.corpus import Corpus, match_labels, warn_about_blank_texts
from workers.corpora.errors import CorpusError
from workers.fitting.progress import Progress, ProgressCallback
from workers.models.errors import CheckpointError
from workers.models.predictions import no_better_than_chance
from workers.training.order import LengthPools
from workers.training.recipes import LabelToken, Recipe, SequenceClassification, Task, lengths_of
from workers.training.scratch import NewModel

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 40.0
EVAL_BATCH = 64

Phase = Literal["training", "measuring accuracy", "saving"]


@dataclass(frozen=True)
class Epoch:
    """Mean loss and accuracy over one pass, each batch before the step that learns from it."""

    number: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class TrainReport:
    """What was trained.

    Attributes:
        accuracy: on the evaluation corpus; None without one.
        learned_accuracy: on the training texts, over the last epoch; None if a resumed run had no step left.
        at_chance: whether the classifier is no better than always giving the most frequent label.
    """

    out: Path
    recipe: Recipe
    labels: tuple[str, ...]
    rows: int
    accuracy: float | None
    learned_accuracy: float | None
    at_chance: bool
    seconds: float


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training. All of them affect the weights."""

    recipe: Recipe = "sequence-classification"
    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 16
    max_length: int | None = None
    seed: int = 0


def train(
    base: str | NewModel,
    data: Corpus,
    eval_data: Corpus | None,
    out: Path,
    settings: TrainSettings | None = None,
    *,
    overwrite: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: ProgressCallback | None = None,
    epoch: Callable[[Epoch], None] | None = None,
) -> TrainReport:
    """Train with one label per concept of `data`, and save checkpoint and tokenizer in `out`.

    `out` appears as a whole at the end, or not at all. A training that was stopped or killed resumes from its last
    checkpoint when it is started again with the same arguments. The same seed and number of threads give the same
    weights.

    Args:
        base: a checkpoint to fine-tune, or the sizes of a new model (label-token only).
        epoch: called at the end of each pass over the data.

    Raises:
        CheckpointError: `base` cannot be loaded, `out` is not empty, or another process trains into it.
        UnsupportedModel: a family that cannot be served.
        CorpusError: `data` has a single label, or `eval_data` labels that `data` does not have.
    """
    settings = settings or TrainSettings()
    run = _Run(settings, checkpoint_seconds, progress, epoch)
    if not overwrite:
        _check_free(out)
    if isinstance(base, NewModel) and settings.recipe != "label-token":
        raise CheckpointError("a new model is trained with --recipe label-token; other recipes need a --base")
    if len(data.concepts) == 1:
        raise CorpusError(
            f"all rows of {data.name} have the label {data.concepts[0]!r}: a classifier needs two or more"
        )
    if eval_data is not None:
        match_labels(eval_data.concepts, data.concepts)
    _warn_about_rare_labels(data)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the warning about a new head is expected
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.training.lock"
    try:
        with FileLock(lock, timeout=0):
            try:
                accuracy = _train_into(out, base, data, eval_data, run, overwrite)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise CheckpointError(f"another process is training {out}: wait for it, or choose another --out") from None
    learned = run.last_epoch.accuracy if run.last_epoch else None
    at_chance = _at_chance(learned, data) if eval_data is None else _at_chance(accuracy, eval_data)
    seconds = time.monotonic() - run.started
    return TrainReport(out, settings.recipe, data.concepts, len(data), accuracy, learned, at_chance, seconds)


def _check_free(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty: choose another --out, or pass --overwrite")


def _warn_about_rare_labels(data: Corpus) -> None:
    """Log labels and texts that a classifier can hardly learn from."""
    single = [concept for concept, count in data.counts.items() if count == 1]
    if single:
        listed = ", ".join(map(repr, single[:5])) + (", …" if len(single) > 5 else "")
        logger.warning("%s: only one row has the label %s: too few to learn it from", data.name, listed)
    warn_about_blank_texts(data)


def _at_chance(accuracy: float | None, measured: Corpus) -> bool:
    """Whether the accuracy is no better than that of the most frequent label; False if it was not measured."""
    if accuracy is None:
        return False
    return no_better_than_chance(accuracy, max(measured.counts.values()) / len(measured), len(measured))


def _train_into(
    out: Path, base: str | NewModel, data: Corpus, eval_data: Corpus | None, run: "_Run", overwrite: bool
) -> float | None:
    """Train and save. Returns the accuracy on `eval_data`. The caller holds the lock of `out`."""
    settings = run.settings
    prefix = f".{out.name}.training-"
    scratch = out.parent / f"{prefix}{_digest(base, data, settings)}"
    scratch.mkdir(exist_ok=True)
    try:
        set_seed(settings.seed)
        task: Task
        if settings.recipe == "label-token":
            task = LabelToken.of(base, data)
        else:
            assert isinstance(base, str)
            task = SequenceClassification.of(base, data.concepts)
        accuracy = run(task, data, eval_data, scratch)
        run.report("saving", 0, 0)
        result = scratch / "model"
        task.model.save_pretrained(result)
        task.tokenizer.save_pretrained(result)
        if not overwrite:
            _check_free(out)  # again, since training took a while
        if out.exists():
            shutil.rmtree(out)
        os.replace(result, out)
    except BaseException:
        if _last_checkpoint(scratch) is None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    for old in out.parent.iterdir():
        if old.name.startswith(prefix):
            shutil.rmtree(old, ignore_errors=True)
    return accuracy


def _digest(base: str | NewModel, data: Corpus, settings: TrainSettings) -> str:
    """A digest of everything that the weights depend on."""
    return hashlib.sha256(f"{base} {data.sha256} {data.concepts} {settings}".encode()).hexdigest()[:12]


class _Run:
    """A training from its start, or its last checkpoint, to its end. last_epoch: the last one that is complete."""

    def __init__(
        self,
        settings: TrainSettings,
        checkpoint_seconds: float,
        progress: ProgressCallback | None,
        epoch: Callable[[Epoch], None] | None,
    ) -> None:
        self.settings, self.started = settings, time.monotonic()
        self.last_epoch: Epoch | None = None
        self._checkpoint_seconds = checkpoint_seconds
        self._progress, self._epoch = progress, epoch
        self._resumed = 0

    def report(self, phase: Phase, done: int, total: int) -> None:
        """Report the progress to the caller."""
        if self._progress is not None:
            seconds = time.monotonic() - self.started
            self._progress(Progress(phase, done, total, seconds, self._resumed, done / total if total else 0.0))

    def __call__(self, task: Task, data: Corpus, eval_data: Corpus | None, scratch: Path) -> float | None:
        """Train to the end. Returns the accuracy on `eval_data`."""
        settings, report, checkpoint_seconds = self.settings, self.report, self._checkpoint_seconds
        rows = task.rows(data, settings.max_length)
        order = LengthPools(lengths_of(rows), settings.batch_size, settings.seed)
        last = _last_checkpoint(scratch)
        if last is not None:
            self._resumed = json.loads((last / "trainer_state.json").read_text())["global_step"]
        held_out = None if eval_data is None else task.rows(eval_data, settings.max_length)
        metrics = _EpochMetrics()
        end_epoch = self._end_epoch

        class ReportProgress(TrainerCallback):
            saved = time.monotonic()
            measured = 0

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                report("training", state.global_step, state.max_steps)
                now = time.monotonic()
                if now - self.saved >= checkpoint_seconds and state.global_step < state.max_steps:
                    control.should_save = True
                    self.saved = now
                return control

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                end_epoch(math.ceil(state.epoch - 1e-6), metrics)

            def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.measured += 1
                report("measuring accuracy", self.measured, -(-len(held_out or ()) // EVAL_BATCH))

        class TaskTrainer(Trainer):
            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Any:
                loss, logits = task.loss(model, inputs)
                if model.training:
                    metrics.add(loss, logits, inputs["labels"])
                return (loss, {"logits": logits}) if return_outputs else loss

            def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
                return order

        trainer = TaskTrainer(
            model=task.model,
            args=TrainingArguments(
                output_dir=str(scratch),
                num_train_epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                per_device_train_batch_size=settings.batch_size,
                per_device_eval_batch_size=EVAL_BATCH,
                warmup_steps=0.1,
                weight_decay=0.01,
                seed=settings.seed,
                data_seed=settings.seed,
                save_strategy="no",
                save_total_limit=2,
                eval_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                label_names=["labels"],
            ),
            train_dataset=rows,
            data_collator=task.collator,
            callbacks=[ReportProgress()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        if held_out is None:
            return None
        prediction = trainer.predict(held_out)
        return float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())

    def _end_epoch(self, number: int, metrics: "_EpochMetrics") -> None:
        if metrics.rows:
            self.last_epoch = Epoch(number, *metrics.reset())
            if self._epoch is not None:
                self._epoch(self.last_epoch)


class _EpochMetrics:
    """Loss and correct predictions of the batches of an epoch."""

    rows = 0
    _loss: Any = 0.0
    _correct: Any = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch, without waiting for the device."""
        self.rows += len(labels)
        self._loss = self._loss + loss.detach() * len(labels)
        self._correct = self._correct + (logits.detach().argmax(dim=1) == labels).sum()

    def reset(self) -> tuple[float, float]:
        """Mean loss and accuracy, and start anew."""
        means = float(self._loss) / self.rows, float(self._correct) / self.rows
        self.rows, self._loss, self._correct = 0, 0.0, 0
        return means


def _last_checkpoint(scratch: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are deleted. The Trainer writes its state file last."""
    complete = []
    for path in scratch.glob("checkpoint-*"):
        if _is_complete(path):
            complete.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
