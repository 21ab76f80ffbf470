"""Fine-tune a sequence classifier on a corpus, on the transformers Trainer."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from workers.fitting.corpus import Corpus, match_labels
from workers.models.errors import CheckpointError
from workers.models.families import family_of

logger = logging.getLogger(__name__)


class TrainingCancelled(Exception):
    """Stopped by its caller; nothing was written."""


@dataclass(frozen=True)
class TrainProgress:
    """How far the training is, in optimiser steps."""

    steps_done: int
    steps_total: int
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    """What was trained. `accuracy` is that on the evaluation corpus, None without one."""

    out: Path
    labels: tuple[str, ...]
    rows: int
    accuracy: float | None
    seconds: float


def train(
    base: str,
    data: Corpus,
    eval_data: Corpus | None,
    out: Path,
    *,
    epochs: float = 2.0,
    learning_rate: float = 5e-5,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[TrainProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> TrainReport:
    """Fine-tune `base` with one label per concept of `data`, and save checkpoint and tokenizer in `out`.

    `out` appears whole at the end or not at all. The same seed and threads give the same weights.

    Raises:
        CheckpointError: `base` cannot be loaded, or `out` is in the way.
        UnsupportedModel: a family that could not be served afterwards.
        CorpusError: labels of `eval_data` that `data` does not have.
        TrainingCancelled: `cancelled` said so.
    """
    started = time.monotonic()
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out} is not empty: choose another --out, or pass --overwrite")
    labels = data.concepts
    if eval_data is not None:
        match_labels(eval_data.concepts, labels)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # that the head is new is what training is for
    set_seed(seed)
    tokenizer, model = _base(base, labels)
    limit = max_length or min(tokenizer.model_max_length, model.config.max_position_embeddings - 2)

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if cancelled is not None and cancelled():
                raise TrainingCancelled
            if progress is not None:
                progress(TrainProgress(state.global_step, state.max_steps, time.monotonic() - started))

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(scratch / "trainer"),
                num_train_epochs=epochs,
                learning_rate=learning_rate,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=64,
                warmup_steps=0.1,
                weight_decay=0.01,
                train_sampling_strategy="group_by_length",
                seed=seed,
                data_seed=seed,
                save_strategy="no",
                eval_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=_encoded(data, tokenizer, labels, limit),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Tell()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        accuracy = None
        if eval_data is not None:
            prediction = trainer.predict(_encoded(eval_data, tokenizer, labels, limit))
            accuracy = float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())
        made = scratch / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TrainReport(out, labels, len(data), accuracy, time.monotonic() - started)


def _base(base: str, labels: tuple[str, ...]) -> tuple[Any, Any]:
    """Tokenizer and model of the base checkpoint, with a fresh head for `labels`."""
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        family_of(config.model_type)
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_pretrained(
            base, config=config, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {base!r}: {str(error).splitlines()[0]}") from error
    return tokenizer, model


def _encoded(corpus: Corpus, tokenizer: Any, labels: tuple[str, ...], limit: int) -> datasets.Dataset:
    """Token ids and label index of every row."""
    index = {label: number for number, label in enumerate(labels)}

    def rows() -> Any:
        for block in corpus.blocks():
            ids = tokenizer(list(block.texts), truncation=True, max_length=limit, return_token_type_ids=False)
            for n, concept in enumerate(block.concepts):
                yield {
                    "input_ids": ids["input_ids"][n],
                    "attention_mask": ids["attention_mask"][n],
                    "labels": index[concept],
                }

    return datasets.Dataset.from_list(list(rows()))
