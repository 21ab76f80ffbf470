"""An evaluation: settings chosen on texts of their own, measured on test texts, as rows with intervals."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

from range_store.domain.range_set import ModelIdentity, RangeSet
from workers.corpora.corpus import Corpus, match_labels
from workers.evaluation.bootstrap import Bootstrap
from workers.evaluation.measure import CHECKPOINT_SECONDS, measure, truth_of
from workers.evaluation.measures import Outcomes, Row, Summary
from workers.evaluation.selection import Choice, choose
from workers.evaluation.settings import EvaluationSettings, Setting, grid
from workers.evaluation.workload import Workload
from workers.fitting.progress import ProgressCallback
from workers.models.loading import LoadedModel


class EvaluationError(Exception):
    """The evaluation cannot be done as asked; one line that says why."""


@dataclass(frozen=True)
class Evaluation:
    """Rows in the order of the settings, a mean row after the targets of each; settings chosen; every choice made."""

    rows: tuple[Row, ...]
    choices: tuple[Choice, ...]
    run: dict[str, Any]
    checkpoints: tuple[Path, ...] = field(default=(), repr=False)

    def discard_checkpoints(self) -> None:
        """Call when the results are written."""
        for path in self.checkpoints:
            path.unlink(missing_ok=True)


class Measure(Protocol):
    """`workers.evaluation.measure.measure` of some model."""

    def __call__(
        self,
        range_set: RangeSet,
        corpus: Corpus,
        grid: Sequence[Setting],
        settings: EvaluationSettings,
        *,
        phase: str,
        checkpoint_dir: Path | None,
        checkpoint_seconds: float,
        progress: ProgressCallback | None,
    ) -> tuple[Outcomes, Path | None]: ...


class EvaluationOptions(TypedDict, total=False):
    """What `evaluate_by` is told, which says what each means."""

    selection: Corpus | None
    checkpoint_dir: Path | None
    checkpoint_seconds: float
    progress: ProgressCallback | None


def evaluate(
    model: LoadedModel,
    range_set: RangeSet,
    test: Corpus,
    settings: EvaluationSettings,
    **choices: Unpack[EvaluationOptions],
) -> Evaluation:
    """`evaluate_by` of a model in this process."""
    return evaluate_by(partial(measure, model), model.identity, range_set, test, settings, **choices)


def evaluate_by(
    measure: Measure,
    model: ModelIdentity,
    range_set: RangeSet,
    test: Corpus,
    settings: EvaluationSettings,
    *,
    selection: Corpus | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Erase each target in each setting, and measure its texts and all others.

    Args:
        measure: says what the model answers, masked and unmasked.
        range_set: fitted on other texts than `test` and `selection`, with the layers and rankings of `settings`.
        test: its concepts are the model's labels (after the label map).
        selection: texts to choose the best setting of each method on, where there is more than one; None: none is.
        checkpoint_dir: where to keep what is done so far; an evaluation with the same arguments goes on from it.

    Raises:
        CorpusError: labels of `test` or `selection` that the model does not have; both sides are listed.
        EvaluationError: a target without ranges, or no text that is left to measure.
        NotFitted, InvalidErasure: the range set cannot serve a setting.
    """
    started = time.monotonic()
    match_labels(test.concepts, model.labels)
    groups = settings.resolved_layers(model.n_layers)
    targets = settings.targets or range_set.concepts
    check_targets(settings, range_set.concepts)
    settings_of_grid = list(grid(settings, groups, targets))

    def rows_on(corpus: Corpus, phase: str) -> tuple[list[Row], Path | None]:
        outcomes, path = measure(
            range_set,
            corpus,
            settings_of_grid,
            settings,
            phase=phase,
            checkpoint_dir=checkpoint_dir,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress,
        )
        return _rows(outcomes, corpus, model.labels, settings_of_grid, settings), path

    choices: tuple[Choice, ...] = ()
    chosen_path = None
    if selection is not None and _offers_a_choice(settings_of_grid):
        match_labels(selection.concepts, model.labels)
        chosen_rows, chosen_path = rows_on(selection, "choosing settings")
        choices = choose(chosen_rows)
    rows, path = rows_on(test, "measuring")
    run = _run(model, range_set, test, selection if choices else None, settings, groups, targets)
    run["seconds"] = round(time.monotonic() - started, 3)
    run["chosen"] = [asdict(choice) for choice in choices]
    return Evaluation(tuple(rows), choices, run, tuple(each for each in (chosen_path, path) if each is not None))


def workload_of(
    settings: EvaluationSettings, n_layers: int, concepts: Sequence[str], test: Corpus, selection: Corpus | None
) -> Workload:
    """What `evaluate_by` will have to do with ranges of these concepts."""
    groups, targets = settings.resolved_layers(n_layers), settings.targets or concepts
    settings_of_grid = list(grid(settings, groups, targets))
    choosing = len(selection) if selection is not None and _offers_a_choice(settings_of_grid) else 0
    return Workload(settings, len(settings_of_grid), len(groups), len(targets), len(test), choosing)


def check_targets(settings: EvaluationSettings, concepts: Sequence[str]) -> None:
    """Raises EvaluationError unless every target is one of the concepts."""
    unknown = [target for target in settings.targets or () if target not in concepts]
    if unknown:
        raise EvaluationError(
            f"unknown target {', '.join(map(repr, unknown))}; the ranges are of: {', '.join(map(repr, concepts))}"
        )


def _rows(
    outcomes: Outcomes, corpus: Corpus, labels: tuple[str, ...], grid: Sequence[Setting], settings: EvaluationSettings
) -> list[Row]:
    if not outcomes.used.any():
        raise EvaluationError(f"{corpus.name}: no text is left to measure")
    truth = truth_of(corpus, labels)
    bootstrap = Bootstrap(truth[outcomes.used], settings.resamples, settings.seed)
    summary = Summary(outcomes, truth, labels, bootstrap, settings.others)
    rows: list[Row] = []
    first = 0
    for setting in grid:
        rows += summary.rows(setting.erasures, first, setting.positions)
        first += len(setting.erasures)
    return rows


def _offers_a_choice(settings_of_grid: Sequence[Setting]) -> bool:
    methods = [setting.erasures[0].method for setting in settings_of_grid]
    return len(set(methods)) < len(methods)


def _run(
    model: ModelIdentity,
    range_set: RangeSet,
    test: Corpus,
    selection: Corpus | None,
    settings: EvaluationSettings,
    groups: Sequence[tuple[int, ...]],
    targets: Sequence[str],
) -> dict[str, Any]:
    """Every choice that the numbers were made with."""
    fitted = range_set.provenance
    return {
        "range_set": {"id": range_set.id, **fitted.model_dump(mode="json")},
        "model": model.model_dump(mode="json"),
        "test": _about(test),
        "selection": {} if selection is None else _about(selection),
        "settings": {**settings.as_json(), "layers": [list(group) for group in groups], "targets": list(targets)},
        "choices": {
            "site": fitted.settings.site,
            "recorded_at": "read position" if fitted.settings.position == "read" else "mean over real tokens",
            "masked_at": ["every real token" if each == "all" else "read position" for each in settings.positions],
            "texts_fitted": fitted.settings.texts,
            "texts_measured": "those that the unmasked model gets right" if settings.correct_only else "all",
            "rule": "sigma, closed interval",
            "std_ddof": 0,
            "number_of_neurons": "floor(top_fraction · D) in decimal arithmetic",
            "others": "pooled" if settings.others == "pooled" else "unweighted mean over their classes",
            "mean_row": "unweighted over targets",
            "intervals": f"95 % bootstrap, {settings.resamples} resamples within classes, seed {settings.seed}",
            "chosen_by": "largest ΔCAcc − ΔAcc on the selection texts, mean over targets",
        },
    }


def _about(corpus: Corpus) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "selection": corpus.selection,
        "sha256": corpus.sha256,
        "rows": len(corpus),
        "counts": dict(corpus.counts),
        "odd": corpus.odd,
    }
