"""`neuronlens train`: fine-tune a classifier, or train a small one from scratch."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from app.cli import options
from app.cli.terminal import command, hint, print_json, progress, resumable, say
from app.serving.inputs import NewModelChoice, check_model, check_texts
from app.settings import ModelSettings, Settings
from range_store.formatting import format_count

NEW_PANEL = "New model"


@options.expand
def train(
    out: Annotated[Path, typer.Option("--out", help="Directory for the trained checkpoint.")],
    texts: options.CorpusOptions,
    settings: Annotated[Settings, options.SettingsOptions("threads")],
    base: Annotated[
        str | None, typer.Option("--base", help="Checkpoint to start from: a directory, or a name on the hub.")
    ] = None,
    recipe: Annotated[
        Literal["sequence-classification", "label-token"] | None,
        typer.Option(
            "--recipe",
            help="Add a classification head, or one token per label to a causal language model. Default: "
            "sequence-classification; with --new always label-token.",
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out texts to measure the accuracy on.")
    ] = None,
    eval_split: Annotated[str | None, typer.Option("--eval-split", help="Split of --eval-data on the hub.")] = None,
    max_eval_rows: Annotated[
        int | None, typer.Option("--max-eval-rows", min=1, help="Maximum number of rows of --eval-data.")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="Passes over the data.")] = 3.0,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", min=1e-9, help="Peak learning rate. Default: 5e-5; with --new 5e-4."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Texts per step. Default: 16; with --new 32.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Maximum number of tokens; longer texts are cut.")
    ] = None,
    new: Annotated[
        str | None,
        typer.Option(
            "--new",
            help="Start from random weights instead of --base: gpt2, llama or qwen2, with a tokenizer "
            "trained on the data.",
            rich_help_panel=NEW_PANEL,
        ),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Number of blocks.", rich_help_panel=NEW_PANEL)] = 6,
    hidden: Annotated[int, typer.Option("--hidden", min=8, help="Hidden size.", rich_help_panel=NEW_PANEL)] = 256,
    heads: Annotated[
        int, typer.Option("--heads", min=1, help="Number of attention heads.", rich_help_panel=NEW_PANEL)
    ] = 4,
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", min=300, help="Number of tokens.", rich_help_panel=NEW_PANEL)
    ] = 8000,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="JSON file with more settings for transformers.", rich_help_panel=NEW_PANEL),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the weights and the order of the texts.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the content of --out.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a classifier on labelled texts.

    Its labels are those of the data. serve, fit and evaluate load the resulting checkpoint. An interrupted training
    resumes when the command is run again.
    """
    if (base is None) == (new is None):
        raise typer.BadParameter("pass either --base or --new", param_hint="--base")
    if new is not None and recipe == "sequence-classification":
        raise typer.BadParameter("a new model is trained with label-token", param_hint="--recipe")
    texts.check_named(texts.data, "--data")
    chosen = recipe or ("sequence-classification" if new is None else "label-token")
    start = base if new is None else NewModelChoice(new, layers, hidden, heads, vocabulary, _read(config))
    assert start is not None
    learned = texts.corpus(seed=seed)
    held_out = None
    if eval_data or eval_split:
        held_out = texts.corpus(source=eval_data, split=eval_split or "test", max_rows=max_eval_rows, seed=seed)
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a directory", param_hint="--out")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty: choose another, or pass --overwrite", param_hint="--out")
    check_texts(learned, held_out)
    if base is not None:
        check_model(ModelSettings(model=base))
    with resumable(), progress("steps") as on_progress:
        on_progress("loading model and data", 0, 0)
        from app.serving.train import train_model  # here, because it loads torch

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
            threads=settings.threads,
            overwrite=overwrite,
            on_progress=on_progress,
            announce=hint,
        )
    if as_json:
        print_json({**asdict(trained), "out": str(trained.out)})
        return
    accuracy = ""
    if trained.accuracy is not None:
        accuracy = f", accuracy {trained.accuracy:.3f} on {eval_data or 'the test split'}"
    size = f"{format_count(trained.rows, 'row')} with {format_count(len(trained.labels), 'label')}"
    say(f"{out}: {trained.recipe} trained on {size} in {trained.seconds:.0f} s{accuracy}")
    say(f"labels: {', '.join(trained.labels)}")
    if trained.at_chance:
        hint(
            "the model is no better than always predicting the most frequent label: try more --epochs or rows, another "
            "--learning-rate, or texts that distinguish the labels"
        )
    corpus = {
        each: getattr(texts, each) for each in ("data", "dataset", "split", "text_field", "label_field", "label_map")
    }
    fit = command("fit", model=out, **corpus, threads=settings.threads, activate=True)
    hint(f"next: {fit}")


def _read(config: Path | None) -> str | None:
    if config is None:
        return None
    try:
        return config.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read {config}: {error}", param_hint="--config") from None
