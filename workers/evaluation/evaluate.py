"""An evaluation: settings are selected on separate texts and measured on test texts, as rows with intervals."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from range_store.domain.range_set import ModelIdentity, RangeSet
from workers.corpora.corpus import Corpus, match_labels
from workers.evaluation.bootstrap import Bootstrap
from workers.evaluation.measure import CHECKPOINT_SECONDS, Measure, MeasureTask, measure, truth_of
from workers.evaluation.measures import Outcomes, Row, Summary
from workers.evaluation.selection import SelectedSetting, select_settings
from workers.evaluation.settings import EvaluationSettings, Setting, grid
from workers.evaluation.workload import Workload
from workers.fitting.progress import ProgressCallback
from workers.models.loading import LoadedModel


class EvaluationError(Exception):
    """The evaluation is not possible with these settings or texts. The message is one line that says why."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        rows: in the order of the settings, the mean row of each after its targets.
        selected: the best setting of each method on the selection texts.
        run: every choice that the numbers depend on, as in run.json.
    """

    rows: tuple[Row, ...]
    selected: tuple[SelectedSetting, ...]
    run: dict[str, Any]


class EvaluationOptions(TypedDict, total=False):
    """Options of an evaluation; see `evaluate_by`."""

    selection: Corpus | None
    checkpoint_dir: Path | None
    checkpoint_seconds: float
    progress: ProgressCallback | None


def evaluate(
    model: LoadedModel,
    range_set: RangeSet,
    test: Corpus,
    settings: EvaluationSettings,
    **options: Unpack[EvaluationOptions],
) -> Evaluation:
    """Evaluate a model in this process; see `evaluate_by`."""
    return evaluate_by(partial(measure, model), model.identity, range_set, test, settings, **options)


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
    """Erase each target with each setting, and measure the target's texts and all others.

    Args:
        measure: computes the model's answers, masked and unmasked.
        range_set: fitted on other texts than `test` and `selection`, with the layers and rankings of `settings`.
        test: its concepts are labels of the model.
        selection: texts to select the best setting of each method on, if a method has several; None: select none.
        checkpoint_dir: where checkpoints are kept; an evaluation with the same arguments resumes from them.
            The caller deletes them (`workers.evaluation.measure.CHECKPOINTS`) once the results are written.

    Raises:
        CorpusError: `test` or `selection` has labels that the model does not have.
        EvaluationError: a target has no ranges, or no text is left to measure.
        NotFitted, InvalidErasure: the range set cannot serve a setting.
    """
    started = time.monotonic()
    match_labels(test.concepts, model.labels)
    groups = settings.resolved_layers(model.n_layers)
    targets = settings.targets or range_set.concepts
    check_targets(settings, range_set.concepts)
    combinations = list(grid(settings, groups, targets))

    def rows_on(corpus: Corpus, phase: str) -> list[Row]:
        saving = (checkpoint_dir, checkpoint_seconds)
        outcomes = measure(MeasureTask(range_set, corpus, combinations, settings, phase, *saving, progress))
        return _rows(outcomes, corpus, model.labels, combinations, settings)

    selected: tuple[SelectedSetting, ...] = ()
    if selection is not None and _has_candidates(combinations):
        match_labels(selection.concepts, model.labels)
        selected = select_settings(rows_on(selection, "choosing settings"))
    rows = rows_on(test, "measuring")
    run = _run(model, range_set, test, selection if selected else None, settings, groups, targets)
    run["seconds"] = round(time.monotonic() - started, 3)
    run["chosen"] = [asdict(each) for each in selected]
    return Evaluation(tuple(rows), selected, run)


def workload_of(
    settings: EvaluationSettings, n_layers: int, concepts: Sequence[str], test: Corpus, selection: Corpus | None
) -> Workload:
    """How much work `evaluate_by` will have with ranges of these concepts."""
    groups, targets = settings.resolved_layers(n_layers), settings.targets or concepts
    combinations = list(grid(settings, groups, targets))
    selection_texts = len(selection) if selection is not None and _has_candidates(combinations) else 0
    return Workload(settings, len(combinations), len(groups), len(targets), len(test), selection_texts)


def check_targets(settings: EvaluationSettings, concepts: Sequence[str]) -> None:
    """Raises EvaluationError unless every target is one of the concepts."""
    unknown = [target for target in settings.targets or () if target not in concepts]
    if unknown:
        raise EvaluationError(
            f"unknown target {', '.join(map(repr, unknown))}; ranges exist for: {', '.join(map(repr, concepts))}"
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


def _has_candidates(combinations: Sequence[Setting]) -> bool:
    """Whether a method has several settings to select from."""
    methods = [setting.erasures[0].method for setting in combinations]
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
    """Every choice that the numbers depend on."""
    fitted = range_set.provenance
    return {
        "range_set": {"id": range_set.id, **fitted.model_dump(mode="json")},
        "model": model.model_dump(mode="json"),
        "test": _corpus_facts(test),
        "selection": {} if selection is None else _corpus_facts(selection),
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


def _corpus_facts(corpus: Corpus) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "selection": corpus.selection,
        "sha256": corpus.sha256,
        "rows": len(corpus),
        "counts": dict(corpus.counts),
        "odd": corpus.odd,
    }
