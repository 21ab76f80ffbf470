"""One training run on the transformers Trainer, which goes on where it was stopped."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from filelock import FileLock, Timeout
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from workers.fitting.corpus import Corpus, match_labels
from workers.models.errors import CheckpointError
from workers.training.order import LengthPools
from workers.training.recipes import LabelToken, Recipe, SequenceClassification, Task, lengths_of
from workers.training.scratch import NewModel

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 40.0


class TrainingCancelled(Exception):
    """Stopped by its caller; the checkpoint remains."""


@dataclass(frozen=True)
class TrainProgress:
    """How far the training is, in optimiser steps. `resumed_steps` were done by an earlier run."""

    steps_done: int
    steps_total: int
    seconds: float
    resumed_steps: int


@dataclass(frozen=True)
class TrainReport:
    """What was trained. `accuracy` is that on the evaluation corpus, None without one."""

    out: Path
    recipe: Recipe
    labels: tuple[str, ...]
    rows: int
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class TrainSettings:
    """Choices of a training, each of which changes the weights."""

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
    progress: Callable[[TrainProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TrainReport:
    """Train with one label per concept of `data`, and save checkpoint and tokenizer in `out`.

    `out` appears whole at the end or not at all. A training that was stopped or killed goes on from its last checkpoint
    when it is started again with the same arguments. The same seed and threads give the same weights.

    Args:
        base: a checkpoint to fine-tune, or the sizes of a new model (label-token only).

    Raises:
        CheckpointError: `base` cannot be loaded, `out` is in the way, or the same training runs already.
        UnsupportedModel: a family that could not be served afterwards.
        CorpusError: labels of `eval_data` that `data` does not have.
        TrainingCancelled: `cancelled` said so.
    """
    started = time.monotonic()
    settings = settings or TrainSettings()
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out} is not empty: choose another --out, or pass --overwrite")
    if isinstance(base, NewModel) and settings.recipe != "label-token":
        raise CheckpointError("a new model is trained with --recipe label-token; other recipes need a --base")
    if eval_data is not None:
        match_labels(eval_data.concepts, data.concepts)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # that the head is new is what training is for
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.training-{_digest(base, data, settings)}"
    scratch.mkdir(exist_ok=True)
    try:
        with FileLock(scratch / "lock", timeout=0):
            set_seed(settings.seed)
            task: Task
            if settings.recipe == "label-token":
                task = LabelToken.of(base, data)
            else:
                assert isinstance(base, str)
                task = SequenceClassification.of(base, data.concepts)
            accuracy = _run(task, data, eval_data, scratch, settings, checkpoint_seconds, progress, cancelled, started)
            made = scratch / "model"
            task.model.save_pretrained(made)
            task.tokenizer.save_pretrained(made)
            if out.exists():
                shutil.rmtree(out)
            os.replace(made, out)
    except Timeout:
        raise CheckpointError(f"another process is training {out} with the same arguments") from None
    except BaseException:
        if _last_checkpoint(scratch) is None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    for old in out.parent.glob(f".{out.name}.training-*"):
        shutil.rmtree(old, ignore_errors=True)
    return TrainReport(out, settings.recipe, data.concepts, len(data), accuracy, time.monotonic() - started)


def _digest(base: str | NewModel, data: Corpus, settings: TrainSettings) -> str:
    """Names everything that the weights depend on."""
    return hashlib.sha256(f"{base} {data.sha256} {data.concepts} {settings}".encode()).hexdigest()[:12]


def _run(
    task: Task,
    data: Corpus,
    eval_data: Corpus | None,
    scratch: Path,
    settings: TrainSettings,
    checkpoint_seconds: float,
    progress: Callable[[TrainProgress], None] | None,
    cancelled: Callable[[], bool] | None,
    started: float,
) -> float | None:
    """Train to the end; the accuracy on `eval_data`."""
    rows = task.rows(data, settings.max_length)
    order = LengthPools(lengths_of(rows), settings.batch_size, settings.seed)
    last = _last_checkpoint(scratch)
    resumed = json.loads((last / "trainer_state.json").read_text())["global_step"] if last else 0

    class Watch(TrainerCallback):
        saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if cancelled is not None and cancelled():
                raise TrainingCancelled
            if progress is not None:
                progress(TrainProgress(state.global_step, state.max_steps, time.monotonic() - started, resumed))
            now = time.monotonic()
            if now - self.saved >= checkpoint_seconds and state.global_step < state.max_steps:
                control.should_save = True
                self.saved = now
            return control

    class OwnTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, logits = task.loss(model, inputs)
            return (loss, {"logits": logits}) if return_outputs else loss

        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
            return order

    trainer = OwnTrainer(
        model=task.model,
        args=TrainingArguments(
            output_dir=str(scratch),
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=64,
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
        callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if last is not None:
        logger.info("going on from step %d", resumed)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if eval_data is None:
        return None
    prediction = trainer.predict(task.rows(eval_data, settings.max_length))
    return float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())


def _last_checkpoint(scratch: Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes its state file last, so one without it was being written."""
    whole = [path for path in scratch.glob("checkpoint-*") if _is_whole(path)]
    for path in set(scratch.glob("checkpoint-*")) - set(whole):
        shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
