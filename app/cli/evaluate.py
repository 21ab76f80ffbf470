"""`neuronlens evaluate`: fit on one corpus, erase each concept, measure on another."""

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli import options, parsing
from app.cli.control import open_store
from app.cli.fit import corpus_warnings
from app.cli.terminal import hint, print_json, progress, resumable, say, table
from app.serving.inputs import check_model, check_texts
from app.settings import ModelSettings, Settings
from range_store.atomic_files import make_private_directory
from range_store.domain.range_set import CorpusIdentity
from range_store.formatting import format_count
from range_store.storage.store import RangeStore

if TYPE_CHECKING:
    from workers.evaluation.evaluate import Evaluation
    from workers.evaluation.measures import Row

METHODS = ("neuron", "range")
POSITIONS = ("all", "read")
SETTINGS = ("layer", "ranking", "method", "τ", "top", "replaced by", "positions")
COLUMNS = (*SETTINGS, "target", "texts", "Acc", "ΔAcc", "ΔConf", "ΔCAcc", "ΔCConf", "ΔCAcc 95 %", "worst other", "same")
SPARE = ("same", "worst other", "ΔCAcc 95 %", "ΔConf", "ΔCConf", "texts")
"""Columns to leave out on a narrow terminal; results.csv has them all."""
SPLITTING = ("replaced by", "positions")
"""Wide settings that are rarely swept: if they differ, there is a table for each of their values."""
MOST_LINES = 60
"""Maximum number of rows in the terminal; of longer tables only the means over targets are printed."""


@options.expand
def evaluate(
    texts: options.CorpusOptions,
    settings: options.ModelAndStore,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for results.json, results.csv, report.html, … Default: a new one in "
            "NEURONLENS_REPORTS_DIR, where a server lists it.",
        ),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(
            "--test-data",
            help="Texts to measure on, other than those of --data.",
            rich_help_panel=options.DATA_PANEL,
        ),
    ] = None,
    test_split: Annotated[
        str | None,
        typer.Option("--test-split", help="Split of --test-data on the hub.", rich_help_panel=options.DATA_PANEL),
    ] = None,
    max_test_rows: Annotated[
        int | None,
        typer.Option(
            "--max-test-rows",
            min=1,
            help="Maximum number of rows of --test-data.",
            rich_help_panel=options.DATA_PANEL,
        ),
    ] = None,
    select_on: Annotated[
        str | None,
        typer.Option(
            "--select-on",
            help="Texts to select settings on. Default: a tenth of --data, which is kept out of the fit.",
            rich_help_panel=options.DATA_PANEL,
        ),
    ] = None,
    rows_per_class: options.RowsPerClass = None,
    correct_only: Annotated[
        Literal["none", "fit", "test", "both"],
        typer.Option(
            "--correct-only",
            help="Use only texts that the model classifies correctly.",
            rich_help_panel=options.DATA_PANEL,
        ),
    ] = "none",
    range_set: Annotated[
        str | None, typer.Option("--range-set", help="Use this published range set instead of fitting on --data.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="neuron, range or neuron,range.")] = "neuron,range",
    ranking: options.RankingList = "max",
    top_fraction: Annotated[
        str, typer.Option("--top-fraction", help="Shares of the neurons, in (0, 1]. 0.1,…,1.0 has steps of 0.1.")
    ] = "0.3",
    tau: Annotated[str, typer.Option("--tau", help="Half-widths of the ranges in standard deviations.")] = "2.5",
    layer: Annotated[
        str,
        typer.Option("--layer", help="Blocks, each alone: -1 (the last), 4,5 or all. 4+5 masks both at once."),
    ] = "-1",
    target: Annotated[str, typer.Option("--target", help="Concepts to erase, each alone, or all.")] = "all",
    positions: Annotated[
        str,
        typer.Option("--positions", help="Mask all real tokens or only the read position: all, read or all,read."),
    ] = "all",
    replacement: Annotated[
        str, typer.Option("--replacement", help="Values of masked neurons: zero, mean or damp:FACTOR.")
    ] = "zero",
    others: Annotated[
        Literal["pooled", "classes"],
        typer.Option("--others", help="Average CAcc and CConf over all other texts, or over the other classes."),
    ] = "pooled",
    perplexity: Annotated[
        bool,
        typer.Option(
            "--perplexity", help="Also measure the perplexity of the test texts: few-shot models only, an extra pass."
        ),
    ] = False,
    resamples: Annotated[
        int, typer.Option("--resamples", min=0, help="Resamples of the bootstrap; 0: no confidence intervals.")
    ] = 1000,
    fitting: options.FitOptions,
    on_ray: options.ClusterOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure what erasing each concept does to its own texts and to all others.

    Fits on --data and measures on --test-data, for every combination of the comma lists. Settings are selected on
    separate texts. Writes results.json and results.csv (a row per setting and target, and their mean), report.html and
    run.json (all settings of the run). Publishes nothing. An interrupted evaluation resumes when the command is run
    again.
    """
    if range_set is None:
        texts.check_named(texts.data, "--data")
    elif texts.data is not None:
        raise typer.BadParameter(
            "a published range set needs no --data; use --select-on for texts to select settings on",
            param_hint="--range-set",
        )
    texts.check_named(test_data, "--test-data")
    cluster = on_ray.cluster()
    if cluster is not None and perplexity:
        raise typer.BadParameter(
            "perplexity cannot be measured on a cluster: leave out --ray", param_hint="--perplexity"
        )
    fit_correct, test_correct = correct_only in ("fit", "both"), correct_only in ("test", "both")
    grid = {
        "methods": parsing.choices(method, "--method", METHODS),
        "rankings": parsing.rankings(ranking),
        "top_fractions": parsing.fractions(top_fraction),
        "taus": parsing.taus(tau),
        "layers": parsing.layer_groups(layer),
        "targets": None if target == "all" else parsing.words(target, "--target"),
        "replacements": tuple(parsing.replacement(each) for each in parsing.words(replacement, "--replacement")),
        "positions": parsing.choices(positions, "--positions", POSITIONS),
        "correct_only": test_correct,
        "rows_per_class": rows_per_class if test_correct else None,
        "others": others,
        "resamples": resamples,
        "seed": fitting.seed,
        "batch_tokens": fitting.batch_tokens,
    }
    fit_settings = fitting.arguments(fit_correct, rows_per_class)
    all_texts = texts.corpus(seed=fitting.seed)
    learned = None
    if range_set is None:
        learned = replace(all_texts, rows_per_class=None if fit_correct else rows_per_class)
    tested = replace(all_texts, split=None, max_rows=None, rows_per_class=None if test_correct else rows_per_class)
    test = replace(tested, source=test_data, split=test_split or "test", max_rows=max_test_rows)
    selection = replace(tested, source=select_on) if select_on else None
    for each, option in ((learned, "--data"), (selection, "--select-on")):
        if each is not None and each.same_texts(test):
            raise typer.BadParameter(f"these are also the texts of {option}: use other texts", param_hint="--test-data")
    model = settings.model_settings
    if out is None:
        everything = (model, learned, test, selection, range_set, grid, fit_settings, perplexity)
        out = settings.reports / _directory_name(model, everything)
        make_private_directory(settings.reports)
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a directory", param_hint="--out")
    check_texts(learned, test, selection, cluster=cluster)
    check_model(model, cluster)
    with resumable(), progress("rows") as on_progress, _store_for(range_set, settings) as store:
        if store is not None and range_set is not None:
            store.range_sets.provenance(range_set)  # an unknown range set should fail before the model is loaded
        on_progress("loading the model", 0, 0)
        from app.serving.evaluate import evaluate_model  # here, because it loads torch

        evaluation = evaluate_model(
            model,
            learned,
            test,
            out,
            selection=selection,
            published=None if store is None or range_set is None else (store, range_set),
            fit_settings=fit_settings,
            perplexity=perplexity,
            on_progress=on_progress,
            announce=hint,
            cluster=cluster,
            **grid,
        )
    if as_json:
        print_json([row.as_json() for row in evaluation.rows])
    else:
        _print(evaluation)
    labels = evaluation.run["model"]["labels"]
    for line in corpus_warnings(CorpusIdentity.model_validate(evaluation.run["range_set"]["corpus"]), labels):
        hint(line)
    if (accuracy := _chance_accuracy(evaluation)) is not None:
        hint(
            f"the model's accuracy on the test texts is {accuracy:.3f}, no better than always predicting the most "
            "frequent label: the effects of erasing say little"
        )
    hint(f"written: {shlex.quote(str(out / 'report.html'))}, and the numbers beside it")


def _directory_name(model: ModelSettings, everything: tuple[object, ...]) -> str:
    """A directory name that is the same for the same command, which can then resume there."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.served_name).strip(".-") or "model"
    return f"{name}-{hashlib.sha256(repr(everything).encode()).hexdigest()[:8]}"


@contextmanager
def _store_for(range_set: str | None, settings: Settings) -> Iterator[RangeStore | None]:
    if range_set is None:
        yield None
        return
    with open_store(settings) as store:
        yield store


def _print(evaluation: "Evaluation") -> None:
    """Print the results as a table, below the settings that all rows share."""
    rows = evaluation.rows
    if len(rows) > MOST_LINES:
        rows = tuple(row for row in rows if row.target == "mean")
        say(f"mean over targets; every target's row is in results.csv ({len(evaluation.rows)} rows)")
    cells = [
        (
            str(row.layer),
            row.ranking,
            row.method,
            "–" if row.tau is None else f"{row.tau:g}",
            f"{row.top_fraction:g}",
            row.replacement,
            row.positions,
            row.target,
            row.n_target,
            _share(row.base_acc),
            *(_delta(value) for value in (row.delta_acc, row.delta_conf, row.delta_cacc, row.delta_cconf)),
            f"{_delta(row.delta_cacc_low)} … {_delta(row.delta_cacc_high)}",
            f"{row.worst_other} {_delta(row.worst_other_delta_acc)}" if row.worst_other_delta_acc < 0 else "none loses",
            _share(row.unchanged_others),
        )
        for row in rows
    ]
    shared = [index for index in range(len(SETTINGS)) if len({each[index] for each in cells}) == 1]
    splitting = [index for index in range(len(SETTINGS)) if index not in shared and COLUMNS[index] in SPLITTING]
    own = [index for index in range(len(COLUMNS)) if index not in (*shared, *splitting)]
    tables: dict[str, list[list[object]]] = {}
    for each in cells:
        heading = " · ".join(f"{COLUMNS[index]} {each[index]}" for index in splitting)
        tables.setdefault(heading, []).append([each[index] for index in own])
    if shared:
        say(" · ".join(f"{COLUMNS[index]} {cells[0][index]}" for index in shared))
    for heading, lines in tables.items():
        if heading:
            say(heading)
        table([COLUMNS[index] for index in own], lines, spare=SPARE)
    for line in chance_warnings(evaluation.rows):
        say(line)
    for choice in evaluation.selected:
        layer, ranking, method, tau, fraction, replacement, positions = choice.setting
        width = "" if tau is None else f" · τ {tau:g}"
        say(
            f"selected for {method} masking among {choice.candidates} settings on separate texts: layer {layer} · "
            f"ranking {ranking}{width} · top {fraction:g} · {replacement} · {positions} positions "
            f"(score {choice.score:+.3f})"
        )


def _chance_accuracy(evaluation: "Evaluation") -> float | None:
    """The unmasked model's accuracy if it is no better than always predicting the largest class, else None."""
    from workers.models.predictions import no_better_than_chance

    counts = evaluation.run["test"]["counts"]
    targets = {row.target: row for row in evaluation.rows if row.target in counts}
    row = next(iter(targets.values()), None)
    if row is None or evaluation.run["settings"]["correct_only"] or evaluation.run["settings"]["others"] != "pooled":
        return None
    texts = row.n_target + row.n_others
    parts = ((row.n_target, row.base_acc), (row.n_others, row.base_cacc))
    accuracy = sum(number * share for number, share in parts if number) / texts
    largest = max(counts.values()) / sum(counts.values())
    return accuracy if no_better_than_chance(accuracy, largest, texts) else None


def chance_warnings(rows: "Sequence[Row]") -> list[str]:
    """The results that are at chance, a line per method."""
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method and row.target != "mean"]
        gone = [row for row in own if row.at_chance]
        if gone:
            concepts = ", ".join(dict.fromkeys(row.target for row in gone))
            tops = ", ".join(f"{top:g}" for top in sorted({row.top_fraction for row in gone}))
            share = f"{len(gone):,} of {format_count(len(own), 'erasure')}"
            lines.append(
                f"at chance: {method} masking of {concepts} (top {tops}; {share}) gives nearly all texts one label "
                "or equal scores: it erases everything, not the concept alone"
            )
    return lines


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def _delta(value: float) -> str:
    """Signed; a minus sign that tables align."""
    return "–" if value != value else f"{value:+.3f}"
