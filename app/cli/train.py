"""`neuronlens train`: fine-tune a sequence classifier."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options
from app.cli.console import hint, print_json, progress, say
from app.cli.stores import settings_with
from app.jobs import CorpusChoice


def train(
    base: Annotated[str, typer.Option("--base", help="Checkpoint to start from: a directory, or a name on the hub.")],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="Directory for the trained checkpoint.")],
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Held-out texts to measure accuracy on.")] = None,
    split: options.Split = None,
    eval_split: Annotated[str | None, typer.Option("--eval-split", help="Split of --eval-data on the hub.")] = None,
    text_field: options.TextField = "text",
    label_field: options.LabelField = "label",
    label_map: options.LabelMap = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="Passes over the data.")] = 3.0,
    max_rows: options.MaxRows = None,
    max_eval_rows: Annotated[int | None, typer.Option("--max-eval-rows", min=1, help="Rows of --eval-data.")] = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=1e-9, help="Peak learning rate.")] = 5e-5,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts of one step.")] = 16,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Cut texts at so many tokens.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and order.")] = 0,
    threads: options.Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a sequence classifier on labelled texts.

    Its labels are those of the data. The result is a checkpoint that serve, fit and evaluate load.
    """
    learned = CorpusChoice(data, split, text_field, label_field, label_map, max_rows)
    held_out = (
        CorpusChoice(eval_data, eval_split, text_field, label_field, label_map, max_eval_rows) if eval_data else None
    )
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a directory", param_hint="--out")
    with progress("steps") as report:
        report("loading model and data", 0, 0)
        from app.wiring import train_model  # here, because it loads torch

        trained = train_model(
            base,
            learned,
            held_out,
            out,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            threads=settings_with(threads=threads).threads,
            overwrite=overwrite,
            report=report,
        )
    if as_json:
        print_json({**asdict(trained), "out": str(trained.out)})
        return
    accuracy = "" if trained.accuracy is None else f", accuracy {trained.accuracy:.3f} on {eval_data}"
    say(f"{out}: trained on {trained.rows} rows for {len(trained.labels)} labels in {trained.seconds:.0f} s{accuracy}")
    say(f"labels: {', '.join(trained.labels)}")
    hint(f"next: neuronlens fit --model {shlex.quote(str(out))} --data {shlex.quote(data)} --activate")
