"""`neuronlens evaluate`: fit on one corpus, erase each concept, measure on another."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options
from app.cli.console import hint, print_json, progress, say, table
from app.cli.stores import settings_with
from app.jobs import CorpusChoice, ModelChoice
from range_store.erasure import RANKINGS

if TYPE_CHECKING:
    from app.wiring import Evaluation

METHODS = ("neuron", "range")
SETTINGS = ("layer", "ranking", "method", "τ", "top")
COLUMNS = (*SETTINGS, "target", "texts", "Acc", "ΔAcc", "ΔConf", "ΔCAcc", "ΔCConf")


def evaluate(
    model: options.Model,
    data: options.Data,
    test_data: Annotated[str, typer.Option("--test-data", help="Texts to measure on; never those of --data.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for results.json and run.json.")],
    method: Annotated[str, typer.Option("--method", help="neuron, range or both.")] = "neuron,range",
    top_fraction: Annotated[str, typer.Option("--top-fraction", help="Shares of the neurons, in (0, 1].")] = "0.3",
    ranking: Annotated[str, typer.Option("--ranking", help=f"Out of {', '.join(RANKINGS)}.")] = "max",
    tau: Annotated[str, typer.Option("--tau", help="Half-widths of the ranges, in standard deviations.")] = "2.5",
    layer: options.Layer = "-1",
    target: Annotated[str, typer.Option("--target", help="Concepts to erase, each alone, or all.")] = "all",
    replacement: Annotated[str, typer.Option("--replacement", help="zero, mean or damp:FACTOR.")] = "zero",
    split: options.Split = None,
    test_split: Annotated[str | None, typer.Option("--test-split", help="Split of --test-data on the hub.")] = None,
    text_field: options.TextField = "text",
    label_field: options.LabelField = "label",
    label_map: options.LabelMap = None,
    max_rows: options.MaxRows = None,
    max_test_rows: Annotated[int | None, typer.Option("--max-test-rows", min=1, help="Rows of --test-data.")] = None,
    batch_tokens: options.BatchTokens = 4096,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = None,
    threads: options.Threads = None,
    allow_pickle: options.AllowPickle = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure erasures: per concept, what they take from its texts and from all others.

    Fits on --data and measures on --test-data, for every combination of the comma lists. Writes results.json (one row
    per setting and target, and their mean) and run.json (every choice made). Nothing is published.
    """
    methods = options.choices(method, "--method", METHODS)
    rankings = options.choices(ranking, "--ranking", RANKINGS)
    fractions, taus, layers = options.fractions(top_fraction), options.taus(tau), options.layers(layer)
    targets = None if target == "all" else options.words(target, "--target")
    replace = options.replacement(replacement)
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a directory", param_hint="--out")
    settings = settings_with(
        model=model, revision=revision, device=device, dtype=dtype, threads=threads, allow_pickle=allow_pickle
    )
    with progress("rows") as report:
        report("loading the model", 0, 0)
        from app.wiring import evaluate_model  # here, because it loads torch

        evaluation = evaluate_model(
            ModelChoice.of(settings),
            CorpusChoice(data, split, text_field, label_field, label_map, max_rows),
            CorpusChoice(test_data, test_split, text_field, label_field, label_map, max_test_rows),
            out,
            methods=methods,
            rankings=rankings,
            top_fractions=fractions,
            taus=taus,
            layers=layers,
            targets=targets,
            replacement=replace,
            batch_tokens=batch_tokens,
            report=report,
        )
    if as_json:
        print_json([row.as_json() for row in evaluation.rows])
    else:
        _show(evaluation)
    hint(f"written: {shlex.quote(str(out / 'results.json'))} and {shlex.quote(str(out / 'run.json'))}")


def _show(evaluation: "Evaluation") -> None:
    """A table; settings that all rows share stand above it."""
    cells = [
        (
            str(row.layer),
            row.ranking,
            row.method,
            "–" if row.tau is None else f"{row.tau:g}",
            f"{row.top_fraction:g}",
            row.target,
            row.n_target,
            _share(row.base_acc),
            *(_delta(value) for value in (row.delta_acc, row.delta_conf, row.delta_cacc, row.delta_cconf)),
        )
        for row in evaluation.rows
    ]
    shared = [index for index in range(len(SETTINGS)) if len({each[index] for each in cells}) == 1]
    own = [index for index in range(len(COLUMNS)) if index not in shared]
    if shared:
        say(" · ".join(f"{COLUMNS[index]} {cells[0][index]}" for index in shared))
    table([COLUMNS[index] for index in own], [[each[index] for index in own] for each in cells])


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _delta(value: float) -> str:
    """Signed; a minus sign that tables align."""
    return "–" if value != value else f"{value:+.3f}"
