"""`neuronlens evaluate`: fit on one corpus, erase each concept, measure on another."""

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.choices import CorpusChoice, ModelChoice
from app.cli import options
from app.cli.fit import about_corpus
from app.cli.stores import settings_with, store_of
from app.cli.terminal import hint, print_json, progress, say, table
from app.errors import INTERRUPTED
from range_store.atomic_files import make_private_directory
from range_store.domain.erasure import RANKINGS
from range_store.domain.range_set import CorpusIdentity, ProbeSettings
from range_store.formatting import format_count
from range_store.storage.store import RangeStore

if TYPE_CHECKING:
    from app.serving.wiring import Evaluation, Row
    from app.settings import Settings

METHODS = ("neuron", "range")
POSITIONS = ("all", "read")
SETTINGS = ("layer", "ranking", "method", "τ", "top", "replaced by", "positions")
SPARE = ("same", "worst other", "ΔCAcc 95 %", "ΔConf", "ΔCConf", "texts")
"""Columns that a narrow terminal does without; results.csv has them all."""
PARTED = ("replaced by", "positions")
"""Settings that part the table where they differ: they take much room, and are rarely swept."""
COLUMNS = (*SETTINGS, "target", "texts", "Acc", "ΔAcc", "ΔConf", "ΔCAcc", "ΔCConf", "ΔCAcc 95 %", "worst other", "same")
MOST_LINES = 60
"""Rows of the table in the terminal; beyond that, the mean rows stand for their targets."""


def evaluate(
    model: options.Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Directory for results.json, results.csv, report.html, … Default: one of its own in "
            "NEURONLENS_REPORTS_DIR, where a server shows it.",
        ),
    ] = None,
    data: options.Data = None,
    test_data: Annotated[
        str | None, typer.Option("--test-data", help="Texts to measure on; never those of --data.")
    ] = None,
    dataset: options.Dataset = None,
    select_on: Annotated[
        str | None,
        typer.Option(
            "--select-on", help="Texts to choose settings on. Default: a tenth of --data, kept out of the fit."
        ),
    ] = None,
    range_set: Annotated[
        str | None, typer.Option("--range-set", help="Use this published range set, instead of fitting on --data.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="neuron, range or neuron,range.")] = "neuron,range",
    ranking: Annotated[str, typer.Option("--ranking", help=f"Out of {', '.join(RANKINGS)}, or all.")] = "max",
    top_fraction: Annotated[
        str, typer.Option("--top-fraction", help="Shares of the neurons, in (0, 1]; 0.1,…,1.0 counts up.")
    ] = "0.3",
    tau: Annotated[str, typer.Option("--tau", help="Half-widths of the ranges, in standard deviations.")] = "2.5",
    layer: Annotated[
        str, typer.Option("--layer", help="Blocks, each alone: -1 (the last), 4,5 or all; 4+5 masks two at once.")
    ] = "-1",
    target: Annotated[str, typer.Option("--target", help="Concepts to erase, each alone, or all.")] = "all",
    positions: Annotated[
        str,
        typer.Option("--positions", help="Mask all real tokens, or the read position alone: all, read or all,read."),
    ] = "all",
    replacement: Annotated[str, typer.Option("--replacement", help="zero, mean or damp:FACTOR.")] = "zero",
    site: options.Site = "block_output",
    position: options.Position = "read",
    correct_only: Annotated[
        Literal["none", "fit", "test", "both"],
        typer.Option(
            "--correct-only", help="Use only texts that the model gets right.", rich_help_panel=options.DATA_PANEL
        ),
    ] = "none",
    others: Annotated[
        Literal["pooled", "classes"],
        typer.Option("--others", help="CAcc, CConf over all other texts, or unweighted over the other classes."),
    ] = "pooled",
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Also of the test texts; few-shot models only, a pass of its own.")
    ] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=0, help="Of the bootstrap; 0: no intervals.")] = 1000,
    seed: options.Seed = 0,
    probe_l1: options.ProbeL1 = 1e-3,
    probe_l2: options.ProbeL2 = 1e-3,
    probe_rows: options.ProbeRows = 4096,
    bins: Annotated[int, typer.Option("--bins", min=1, help="Bins of each neuron's histogram.")] = 512,
    split: options.Split = None,
    test_split: Annotated[str | None, typer.Option("--test-split", help="Split of --test-data on the hub.")] = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    label_map: options.LabelMap = None,
    max_rows: options.MaxRows = None,
    max_test_rows: Annotated[int | None, typer.Option("--max-test-rows", min=1, help="Rows of --test-data.")] = None,
    rows_per_class: options.RowsPerClass = None,
    batch_tokens: options.BatchTokens = 4096,
    ray: options.Ray = None,
    actors: options.Actors = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = None,
    threads: options.Threads = None,
    allow_pickle: options.AllowPickle = None,
    plain: options.Plain = None,
    template: options.Template = None,
    scoring: options.Scoring = None,
    name: options.Name = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure erasures: per concept, what they take from its texts and from all others.

    Fits on --data and measures on --test-data, for every combination of the comma lists. What is chosen is chosen on
    texts of its own. Writes results.json and results.csv (one row per setting and target, and their mean), report.html
    and run.json (every choice made). Nothing is published. Stopped, it goes on when the same command is started again.
    """
    if range_set is None:
        options.some_data(data, dataset)
    elif data is not None:
        raise typer.BadParameter(
            "published ranges need no --data; name texts to choose settings on with --select-on",
            param_hint="--range-set",
        )
    options.some_data(test_data, dataset, "--test-data")
    cluster = options.ray_choice(ray, actors)
    if cluster is not None and perplexity:
        raise typer.BadParameter("it is measured in one process: leave out --ray", param_hint="--perplexity")
    settings_of_grid = {
        "methods": options.choices(method, "--method", METHODS),
        "rankings": options.rankings(ranking),
        "top_fractions": options.fractions(top_fraction),
        "taus": options.taus(tau),
        "layers": options.layer_groups(layer),
        "targets": None if target == "all" else options.words(target, "--target"),
        "replacements": tuple(options.replacement(each) for each in options.words(replacement, "--replacement")),
        "positions": options.choices(positions, "--positions", POSITIONS),
        "correct_only": correct_only in ("test", "both"),
        "rows_per_class": rows_per_class if correct_only in ("test", "both") else None,
        "others": others,
        "resamples": resamples,
        "seed": seed,
        "batch_tokens": batch_tokens,
    }
    settings_of_fit = {
        "site": site,
        "position": position,
        "correct_only": correct_only in ("fit", "both"),
        "rows_per_class": rows_per_class if correct_only in ("fit", "both") else None,
        "probe": ProbeSettings(l1=probe_l1, l2=probe_l2, rows=probe_rows, seed=seed),
        "bins": bins,
        "batch_tokens": batch_tokens,
    }
    settings = settings_with(
        model=model,
        name=name,
        revision=revision,
        device=device,
        dtype=dtype,
        threads=threads,
        allow_pickle=allow_pickle,
        plain=plain,
        template=template,
        scoring=scoring,
        redis_url=redis_url,
        data_dir=data_dir,
    )

    def corpus(source: str | None, split: str | None, rows: int | None, correct: bool) -> CorpusChoice:
        of_class = None if correct else rows_per_class
        return CorpusChoice(source, dataset, split, text_field, label_field, label_map, rows, of_class, seed)

    learned = corpus(data, split, max_rows, correct_only in ("fit", "both")) if range_set is None else None
    test = corpus(test_data, test_split or "test", max_test_rows, correct_only in ("test", "both"))
    selection = corpus(select_on, None, None, correct_only in ("test", "both")) if select_on else None
    for each, option in ((learned, "--data"), (selection, "--select-on")):
        if each is not None and each.same_texts(test):
            raise typer.BadParameter(f"these are the texts of {option}: name others", param_hint="--test-data")
    chosen = ModelChoice.of(settings)
    everything = (chosen, learned, test, selection, range_set, settings_of_grid, settings_of_fit, perplexity)
    if out is None:
        out = settings.reports / _name_of(chosen, everything)
        make_private_directory(settings.reports)
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a directory", param_hint="--out")
    from app.cli.inputs import check_model, check_texts

    check_texts(learned, test, selection, cluster=cluster)
    check_model(chosen, cluster)
    try:
        with progress("rows") as report, _store_for(range_set, settings) as store:
            if store is not None and range_set is not None:
                store.provenance(range_set)  # one that is not published should be known before a model is loaded for it
            report("loading the model", 0, 0)
            from app.serving.wiring import evaluate_model  # here, because it loads torch

            evaluation = evaluate_model(
                chosen,
                learned,
                test,
                out,
                selection=selection,
                published=None if store is None or range_set is None else (store, range_set),
                fit_settings=settings_of_fit,
                perplexity=perplexity,
                report=report,
                tell=hint,
                cluster=cluster,
                **settings_of_grid,
            )
    except KeyboardInterrupt:
        hint("interrupted: the same command goes on from the last checkpoint")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json([row.as_json() for row in evaluation.rows])
    else:
        _show(evaluation)
    labels = evaluation.run["model"]["labels"]
    for line in about_corpus(CorpusIdentity.model_validate(evaluation.run["range_set"]["corpus"]), labels):
        hint(line)
    if (accuracy := _at_chance(evaluation)) is not None:
        hint(
            f"the model's accuracy on the test texts is {accuracy:.3f}, no better than always giving their most "
            "frequent label: what erasing takes from it says little"
        )
    hint(f"written: {shlex.quote(str(out / 'report.html'))}, and the numbers beside it")


def _name_of(model: ModelChoice, everything: tuple[object, ...]) -> str:
    """A directory's name, the same for the same command, so that it goes on there when it is started again."""
    named = re.sub(r"[^A-Za-z0-9._-]+", "-", model.served_name).strip(".-") or "model"
    return f"{named}-{hashlib.sha256(repr(everything).encode()).hexdigest()[:8]}"


@contextmanager
def _store_for(range_set: str | None, settings: "Settings") -> Iterator[RangeStore | None]:
    if range_set is None:
        yield None
        return
    with store_of(settings, None) as store:
        yield store


def _show(evaluation: "Evaluation") -> None:
    """A table; settings that all rows share stand above it."""
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
    parted = [index for index in range(len(SETTINGS)) if index not in shared and COLUMNS[index] in PARTED]
    own = [index for index in range(len(COLUMNS)) if index not in (*shared, *parted)]
    parts: dict[str, list[list[object]]] = {}
    for each in cells:
        heading = " · ".join(f"{COLUMNS[index]} {each[index]}" for index in parted)
        parts.setdefault(heading, []).append([each[index] for index in own])
    if shared:
        say(" · ".join(f"{COLUMNS[index]} {cells[0][index]}" for index in shared))
    for heading, lines in parts.items():
        if heading:
            say(heading)
        table([COLUMNS[index] for index in own], lines, spare=SPARE)
    for line in about_chance(evaluation.rows):
        say(line)
    for choice in evaluation.choices:
        layer, ranking, method, tau, fraction, replacement, positions = choice.setting
        width = "" if tau is None else f" · τ {tau:g}"
        say(
            f"chosen for {method} masking out of {choice.candidates} on texts of their own: layer {layer} · "
            f"ranking {ranking}{width} · top {fraction:g} · {replacement} · {positions} positions "
            f"(score {choice.score:+.3f})"
        )


def _at_chance(evaluation: "Evaluation") -> float | None:
    """The unmasked model's accuracy, if it is no better than always predicting the largest class."""
    from app.serving.service import no_better_than_chance

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


def about_chance(rows: "Sequence[Row]") -> list[str]:
    """Which settings leave a result at chance, one line for each method."""
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
