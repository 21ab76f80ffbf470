"""`neuronlens train`: fine-tune a classifier, or train a small one from nothing."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from app.choices import CorpusChoice, ModelChoice, NewModelChoice
from app.cli import options
from app.cli.commands import command
from app.cli.stores import settings_with
from app.cli.terminal import hint, print_json, progress, say
from app.errors import INTERRUPTED
from range_store.formatting import format_count

NEW_PANEL = "New model"


def train(
    out: Annotated[Path, typer.Option("--out", help="Directory for the trained checkpoint.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Checkpoint to start from: a directory, or a name on the hub.")
    ] = None,
    data: options.Data = None,
    recipe: Annotated[
        Literal["sequence-classification", "label-token"] | None,
        typer.Option(
            "--recipe",
            help="A head for the labels, or one added token per label of a causal language model. Default: "
            "sequence-classification; a new model is always trained with label-token.",
        ),
    ] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Held-out texts to measure accuracy on.")] = None,
    dataset: options.Dataset = None,
    split: options.Split = None,
    eval_split: Annotated[str | None, typer.Option("--eval-split", help="Split of --eval-data on the hub.")] = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    label_map: options.LabelMap = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="Passes over the data.")] = 3.0,
    max_rows: options.MaxRows = None,
    max_eval_rows: Annotated[int | None, typer.Option("--max-eval-rows", min=1, help="Rows of --eval-data.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", min=1e-9, help="Peak rate. Default: 5e-5, for a new model 5e-4.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Texts of one step. Default: 16, for a new model 32.")
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="Cut texts at so many tokens.")] = None,
    new: Annotated[
        str | None,
        typer.Option(
            "--new",
            help="Start from random weights instead of --base: gpt2, llama or qwen2, with a tokenizer of the data.",
            rich_help_panel=NEW_PANEL,
        ),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Its blocks.", rich_help_panel=NEW_PANEL)] = 6,
    hidden: Annotated[int, typer.Option("--hidden", min=8, help="Its hidden size.", rich_help_panel=NEW_PANEL)] = 256,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Its attention heads.", rich_help_panel=NEW_PANEL)] = 4,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", min=300, help="Tokens of its tokenizer.", rich_help_panel=NEW_PANEL)
    ] = 8000,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="JSON file of further transformers settings of it.", rich_help_panel=NEW_PANEL),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and order.")] = 0,
    threads: options.Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a classifier on labelled texts.

    Its labels are those of the data. The result is a checkpoint that serve, fit and evaluate load. A training that was
    stopped goes on when the same command is started again.
    """
    if (base is None) == (new is None):
        raise typer.BadParameter("name a checkpoint, or --new for random weights; one of the two", param_hint="--base")
    if new is not None and recipe == "sequence-classification":
        raise typer.BadParameter("a new model is trained with label-token", param_hint="--recipe")
    options.some_data(data, dataset)
    chosen = recipe or ("sequence-classification" if new is None else "label-token")
    start = base if new is None else NewModelChoice(new, layers, hidden, heads, vocabulary, _text_of(config))
    assert start is not None
    learned = CorpusChoice(data, dataset, split, text_field, label_field, label_map, max_rows, seed=seed)
    held_out = None
    if eval_data or eval_split:
        test_split = eval_split or "test"
        held_out = CorpusChoice(
            eval_data, dataset, test_split, text_field, label_field, label_map, max_eval_rows, seed=seed
        )
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a directory", param_hint="--out")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty: choose another, or pass --overwrite", param_hint="--out")
    from app.cli.inputs import check_model, check_texts

    check_texts(learned, held_out)
    if base is not None:
        check_model(ModelChoice(base))
    try:
        with progress("steps") as report:
            report("loading model and data", 0, 0)
            from app.serving.wiring import train_model  # here, because it loads torch

            trained = train_model(
                start,
                learned,
                held_out,
                out,
                recipe=chosen,
                epochs=epochs,
                learning_rate=learning_rate or (5e-5 if new is None else 5e-4),
                batch_size=batch_size or (16 if new is None else 32),
                max_length=max_length,
                seed=seed,
                threads=settings_with(threads=threads).threads,
                overwrite=overwrite,
                report=report,
                say=hint,
            )
    except KeyboardInterrupt:
        hint("interrupted: the same command goes on from the last checkpoint")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json({**asdict(trained), "out": str(trained.out)})
        return
    accuracy = (
        "" if trained.accuracy is None else f", accuracy {trained.accuracy:.3f} on {eval_data or 'the test split'}"
    )
    size = f"{format_count(trained.rows, 'row')} for {format_count(len(trained.labels), 'label')}"
    say(f"{out}: {trained.recipe} trained on {size} in {trained.seconds:.0f} s{accuracy}")
    say(f"labels: {', '.join(trained.labels)}")
    if trained.at_chance:
        hint(
            "the model is no better than one that always gives the most frequent label: it needs more --epochs or "
            "rows, another --learning-rate, or texts that tell the labels apart"
        )
    corpus = {"data": data, "dataset": dataset, "split": split, "text_field": text_field, "label_field": label_field}
    fit = command("fit", model=out, **corpus, label_map=label_map, threads=threads, activate=True)
    hint(f"next: {fit}")


def _text_of(config: Path | None) -> str | None:
    if config is None:
        return None
    try:
        return config.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read {config}: {error}", param_hint="--config") from None
