"""The evaluation equals a plain loop that runs one text at a time with one full hooked pass per setting."""

import csv
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from range_store.domain.erasure import Erasure
from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from tests.processes import Running
from tests.workers.checkpoints import LABELS, save_tiny
from tests.workers.masking import Alike, edits_of
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.corpus import Corpus
from workers.corpora.errors import CorpusError
from workers.corpora.loading import load_corpus
from workers.evaluation.bootstrap import Bootstrap
from workers.evaluation.evaluate import EvaluationError, evaluate
from workers.evaluation.files import write
from workers.evaluation.measure import CHECKPOINTS, MeasureTask, measure
from workers.evaluation.measures import CSV_COLUMNS, Labels, Outcomes, Summary
from workers.evaluation.perplexity import check_perplexity
from workers.evaluation.settings import EvaluationSettings, grid
from workers.fitting.fit import fit
from workers.fitting.progress import Progress
from workers.models.errors import PredictsNoLabels
from workers.models.loading import LoadedModel, load_model
from workers.models.predictions import NO_LABEL, Head
from workers.models.prepack import STEP
from workers.models.tokens import TokenBatch

Tiny = Callable[[str], LoadedModel]


class Hooked(Alike):
    """Masking of one erasure, written without the code under test."""

    def __init__(self, range_set: RangeSet, erasure: Erasure) -> None:
        plan = resolve(range_set, [erasure])
        (self.layer,) = plan.edits
        self.layers = (self.layer,)
        self.mask = plan.edits[self.layer]

    def __call__(self, layer: int, hidden: Tensor, batch: TokenBatch) -> Tensor:
        low, high = torch.from_numpy(self.mask.low[0]), torch.from_numpy(self.mask.high[0])
        hit = ((hidden >= low) & (hidden <= high)) | torch.from_numpy(self.mask.always[0])
        return torch.where(hit & batch.mask.unsqueeze(-1), torch.zeros_like(hidden), hidden)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", labelled_texts(60, seed=1))
    return load_corpus(str(path), labels=LABELS)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = write_jsonl(tmp_path_factory.mktemp("data") / "test.jsonl", labelled_texts(37, seed=2))
    return load_corpus(str(path), labels=LABELS)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_rows_equal_a_plain_loop(tiny: Tiny, family: str, learned: Corpus, held_out: Corpus) -> None:
    model = tiny(family)
    range_set = fit(model, learned, layers="all").range_set
    settings = EvaluationSettings(
        rankings=("max", "selectivity"), top_fractions=(0.25, 1.0), taus=(1.0, 2.5), layers="all", batch_tokens=200
    )
    evaluation = evaluate(model, range_set, held_out, settings)
    texts = [
        (text, concept)
        for chunk in held_out.chunks()
        for text, concept in zip(chunk.texts, chunk.concepts, strict=True)
    ]
    truth = np.array([LABELS.index(concept) for _, concept in texts])
    alone = [model.tokens.batch(model.tokens.encode([text])) for text, _ in texts]
    bare = torch.cat([model.steered.logits(batch) for batch in alone]).softmax(dim=1).numpy()
    # 2 rankings × (neuron + range at two τ) × 2 fractions × (4 targets and their mean), at each of three layers
    assert len(evaluation.rows) == 3 * 2 * 3 * 2 * 5
    for row in evaluation.rows[::7]:  # 7 has no factor in common with the numbers of settings and targets
        if row.target == "mean":
            continue
        erasure = Erasure.model_validate(
            {
                "concept": row.target,
                "method": row.method,
                "tau": row.tau or 0.0,
                "top_fraction": row.top_fraction,
                "ranking": row.ranking,
                "layers": (row.layer,),
            }
        )
        masking = Hooked(range_set, erasure)
        masked = torch.cat([model.steered.hooked(batch, masking) for batch in alone]).softmax(dim=1).numpy()
        own = truth == LABELS.index(row.target)
        n = np.arange(len(texts))
        for chosen, acc, conf in ((own, row.delta_acc, row.delta_conf), (~own, row.delta_cacc, row.delta_cconf)):
            conf_delta = (masked[n, truth] - bare[n, truth])[chosen].mean()
            acc_delta = ((masked.argmax(1) == truth).astype(float) - (bare.argmax(1) == truth))[chosen].mean()
            assert conf == pytest.approx(conf_delta, abs=1e-4)
            assert acc == pytest.approx(acc_delta, abs=1e-9)
        assert (row.n_target, row.n_others) == (own.sum(), (~own).sum())
        assert row.base_acc == pytest.approx((bare.argmax(1) == truth)[own].mean())
        assert row.base_cconf == pytest.approx(bare[n, truth][~own].mean(), abs=1e-5)


def test_mean_rows_average_over_targets(tiny: Tiny, learned: Corpus, held_out: Corpus) -> None:
    model = tiny("bert")
    range_set = fit(model, learned).range_set
    rows = evaluate(model, range_set, held_out, EvaluationSettings(top_fractions=(0.3, 1.0))).rows
    for start in range(0, len(rows), 5):
        *targets, mean = rows[start : start + 5]
        assert [row.target for row in targets] == list(LABELS)
        assert mean.target == "mean"
        assert len({(row.method, row.top_fraction) for row in rows[start : start + 5]}) == 1
        for name in ("base_acc", "delta_acc", "delta_conf", "delta_cacc", "delta_cconf"):
            assert getattr(mean, name) == pytest.approx(np.mean([getattr(row, name) for row in targets]))


def test_files_are_complete_and_name_every_choice(
    tiny: Tiny, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    model = tiny("bert")
    fitted = fit(model, learned)
    evaluation = evaluate(model, fitted.range_set, held_out, EvaluationSettings(targets=("Sports",)))
    out = tmp_path / "deep" / "out"
    write(out, evaluation, fitted.range_set, fitted.inspect)
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "results.csv",
        "results.json",
        "run.json",
        "statistics.json",
    ]
    rows = json.loads((out / "results.json").read_text())
    names = "layer ranking method tau top_fraction target n_target n_others"
    measures = "base_acc base_conf base_cacc base_cconf delta_acc delta_conf delta_cacc delta_cconf"
    assert all(list(row)[:16] == f"{names} {measures}".split() for row in rows), "the first columns have changed"
    assert [row["target"] for row in rows] == ["Sports", "mean"] * 2
    with (out / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0]) == list(CSV_COLUMNS)
    for row, line in zip(rows, table, strict=True):
        for name in CSV_COLUMNS:
            assert line[name] == ("" if row[name] is None else str(row[name]))
    statistics = json.loads((out / "statistics.json").read_text())
    assert [shape["concept"] for shape in statistics["layers"]["2"]["shapes"]][:-1] == list(fitted.range_set.concepts)
    assert len(statistics["claims"]) == 4
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["layers"] == [[2]]
    assert run["range_set"]["model"]["fingerprint"] == model.identity.fingerprint
    assert run["test"]["rows"] == len(held_out)


def test_class_without_test_texts_has_null_measures(tiny: Tiny, learned: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    some = [pair for pair in labelled_texts(30, seed=3) if pair[1] != "World"]
    test = load_corpus(str(write_jsonl(tmp_path / "some.jsonl", some)), labels=LABELS)
    rows = evaluate(model, fit(model, learned).range_set, test, EvaluationSettings(methods=("range",))).rows
    world, mean = rows[0], rows[-1]
    assert world.target == "World"
    assert (world.n_target, world.as_json()["base_acc"], world.as_json()["delta_acc"]) == (0, None, None)
    assert not math.isnan(mean.delta_acc)


def test_unknown_labels_and_targets_are_errors_that_list_both_sides(
    tiny: Tiny, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    model = tiny("bert")
    range_set = fit(model, learned).range_set
    path = write_jsonl(tmp_path / "other.jsonl", [("a goal", "Sport"), ("a vote", "World")])
    with pytest.raises(CorpusError, match=r"Sport.*SciTech"):
        evaluate(model, range_set, load_corpus(str(path), labels=LABELS), EvaluationSettings())
    with pytest.raises(EvaluationError, match=r"Weather.*World"):
        evaluate(model, range_set, held_out, EvaluationSettings(targets=("Weather",)))


class Stopped(Exception):
    """Raised by a progress callback."""


def test_confidence_is_finite_for_huge_logits() -> None:
    outcomes = Outcomes.empty(1, 2)
    truth = np.zeros(2, dtype=np.int16)
    base = outcomes.add_base(np.arange(2), np.array([[1e4, 0, 0], [0, 1e4, 0]], dtype=np.float32), truth)
    assert outcomes.base_predicted.tolist() == [0, 1]
    assert outcomes.base_confidence.tolist() == [1.0, 0.0]
    outcomes.add(np.array([0]), np.arange(2), np.zeros((1, 2, 3), dtype=np.float32), base, truth)
    assert outcomes.confidence[0] == pytest.approx([1 / 3, 1 / 3])
    assert outcomes.kl[0] == pytest.approx([math.log(3), math.log(3)])


def test_labels_of_a_sigmoid_are_measured_each_by_itself() -> None:
    outcomes = Outcomes.empty(1, 2, "sigmoid")
    truth = np.array([0, 1], dtype=np.int16)
    logits = np.log(np.array([[3.0, 1.0], [1 / 3, 4.0]], dtype=np.float32))
    base = outcomes.add_base(np.arange(2), logits, truth)
    assert outcomes.base_confidence == pytest.approx([0.75, 0.8])
    outcomes.add(np.array([0]), np.arange(2), np.zeros((1, 2, 2), dtype=np.float32), base, truth)
    assert outcomes.confidence[0] == pytest.approx([0.5, 0.5])

    def against_half(p: float) -> float:
        return p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))

    assert outcomes.kl[0] == pytest.approx([against_half(0.75), against_half(0.25) + against_half(0.8)], abs=1e-6)


def test_single_label_is_predicted_or_not() -> None:
    outcomes = Outcomes.empty(1, 2, "sigmoid")
    truth = np.zeros(2, dtype=np.int16)
    base = outcomes.add_base(np.arange(2), np.array([[2.0], [-1.0]], dtype=np.float32), truth)
    outcomes.add(np.array([0]), np.arange(2), np.array([[[-2.0], [-1.0]]], dtype=np.float32), base, truth)
    assert outcomes.base_predicted.tolist() == [0, NO_LABEL]
    assert outcomes.predicted[0].tolist() == [NO_LABEL, NO_LABEL]


def test_regression_model_is_refused_where_labels_are_compared(tmp_path: Path) -> None:
    model = load_model(str(save_tiny("bert", tmp_path / "model", problem_type="regression")), device="cpu")
    path = write_jsonl(tmp_path / "rows.jsonl", labelled_texts(8, seed=3))
    corpus = load_corpus(str(path), labels=LABELS)
    range_set = fit(model, corpus, bins=16).range_set
    with pytest.raises(PredictsNoLabels, match="regression"):
        evaluate(model, range_set, corpus, EvaluationSettings())
    with pytest.raises(PredictsNoLabels, match="--correct-only"):
        fit(model, corpus, bins=16, correct_only=True)


def test_further_measures_of_a_case_worked_by_hand() -> None:
    labels = ("a", "b", "c")
    truth = np.array([0, 0, 1, 1, 2, 2], dtype=np.int16)
    outcomes = Outcomes.empty(1, 6)
    outcomes.used[:] = True
    outcomes.base_predicted[:] = [0, 0, 1, 1, 2, 0]
    outcomes.predicted[0] = [1, 2, 1, 0, 2, 1]
    outcomes.base_confidence[:] = 0.5
    outcomes.confidence[0] = [0.1, 0.3, 0.5, 0.5, 0.25, 0.75]
    outcomes.kl[0] = [1, 3, 0, 0, 2, 2]
    bootstrap = Bootstrap(truth, resamples=200, seed=0)
    row, mean = Summary(outcomes, truth, labels, bootstrap).rows([Erasure(concept="a", layers=(1,))], 0, "all")
    assert (row.base_acc, row.delta_acc) == (1.0, -1.0)
    assert (row.base_cacc, row.delta_cacc) == (0.75, -0.25)
    assert row.delta_conf == pytest.approx(-0.3)
    assert row.delta_cconf == pytest.approx(0.0)
    assert (row.kl_target, row.kl_others) == (2.0, 1.0)
    assert row.unchanged_others == 0.5
    assert (row.worst_other, row.worst_other_delta_acc) == ("b", -0.5)
    assert row.destinations == {"b": 1, "c": 1}
    assert (row.delta_acc_low, row.delta_acc_high) == (-1.0, -1.0), "both texts lose in every resample"
    assert row.delta_cacc_low <= row.delta_cacc <= row.delta_cacc_high
    assert mean.delta_cacc_low == row.delta_cacc_low


def test_result_at_chance_is_one_label_or_even_scores_for_texts_of_several_classes() -> None:
    labels = ("a", "b", "c", "d")
    truth = np.arange(200, dtype=np.int16) % 4

    def found(predicted: Any, confidence: float, truth: Labels = truth, head: Head = "softmax") -> bool:
        outcomes = Outcomes.empty(1, len(truth), head)
        outcomes.used[:] = True
        outcomes.base_predicted[:] = truth
        outcomes.predicted[0] = predicted
        outcomes.confidence[0] = confidence
        summary = Summary(outcomes, truth, labels, Bootstrap(truth, resamples=0, seed=0))
        row, mean = summary.rows([Erasure(concept="a", layers=(1,))], 0, "all")
        assert mean.at_chance == row.at_chance
        return row.at_chance

    assert found(2, 0.9)
    assert found(NO_LABEL, 0.9, head="greedy")
    assert found(np.where(np.arange(200) < 2, 1, 2), 0.9), "one in a hundred may differ"
    assert not found(np.where(np.arange(200) < 3, 1, 2), 0.9)
    assert found(truth, 0.299)
    assert not found(truth, 0.301)
    assert found(truth, 0.46, head="sigmoid")
    assert not found(truth, 0.25, head="sigmoid")
    assert not found(truth, 0.25, head="greedy")
    assert not found(2, 0.9, np.full(200, 2, dtype=np.int16)), "they are all of one class"


def test_concept_that_is_no_label_has_all_texts_as_others(tiny: Tiny, held_out: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    rows = [(text, "Weather" if index % 2 else label) for index, (text, label) in enumerate(labelled_texts(60, seed=4))]
    learned = load_corpus(str(write_jsonl(tmp_path / "weather.jsonl", rows)), labels=LABELS)
    settings = EvaluationSettings(targets=("Weather",), methods=("neuron",), top_fractions=(1.0,))
    row, mean = evaluate(model, fit(model, learned).range_set, held_out, settings).rows
    assert (row.n_target, row.n_others) == (0, len(held_out))
    assert row.as_json()["delta_acc"] is None
    assert not math.isnan(row.delta_cacc)
    assert math.isnan(mean.delta_acc)


def test_95_percent_interval_covers_the_true_mean_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        truth = rng.integers(0, 3, size=120).astype(np.int16)
        changes = rng.normal(0.2, 1.0, size=(1, 120))
        bootstrap = Bootstrap(truth, resamples=300, seed=seed)
        low, high = bootstrap.interval(bootstrap.means(changes, target=0)[:, 1])
        covered += bool(low[0] <= 0.2 <= high[0])
    assert 184 <= covered <= 196, "190 are expected; the seeds are fixed, so the number is too"


def test_correct_only_measures_texts_that_the_bare_model_gets_right(
    tiny: Tiny, learned: Corpus, held_out: Corpus
) -> None:
    model = tiny("bert")
    range_set = fit(model, learned).range_set
    everything = evaluate(model, range_set, held_out, EvaluationSettings()).rows
    chosen = evaluate(model, range_set, held_out, EvaluationSettings(correct_only=True)).rows
    for one, all_texts in zip(chosen, everything, strict=True):
        if one.target != "mean":
            assert one.n_target == pytest.approx(all_texts.base_acc * all_texts.n_target)
            assert one.n_target == 0 or one.base_acc == 1.0
    capped = evaluate(model, range_set, held_out, EvaluationSettings(correct_only=True, rows_per_class=2)).rows
    assert max(row.n_target for row in capped if row.target != "mean") <= 2


def test_layers_are_masked_jointly(tiny: Tiny, learned: Corpus, held_out: Corpus) -> None:
    model = tiny("gpt2")
    range_set = fit(model, learned, layers="all").range_set
    settings = EvaluationSettings(layers=((0, 1), (2,)), methods=("range",), taus=(1.0,), targets=("Sports",))
    rows = evaluate(model, range_set, held_out, settings).rows
    assert [row.layer for row in rows] == ["0+1", "0+1", 2, 2]
    erasure = Erasure(concept="Sports", tau=1.0, layers=(0, 1))
    plan = resolve(range_set, [erasure])
    right = total = 0
    for chunk in held_out.chunks():
        for text, concept in zip(chunk.texts, chunk.concepts, strict=True):
            batch = model.tokens.batch(model.tokens.encode([text]))
            logits = model.steered.hooked(batch, edits_of([plan]))
            right += LABELS[int(logits.argmax())] == concept == "Sports"
            total += concept == "Sports"
    assert rows[0].base_acc + rows[0].delta_acc == pytest.approx(right / total)


def test_positions_do_not_matter_at_the_last_block(tiny: Tiny, learned: Corpus, held_out: Corpus) -> None:
    """The head reads one position, so masking other positions of the last block cannot matter."""
    model = tiny("bert")
    range_set = fit(model, learned, layers="all").range_set
    rows = evaluate(
        model, range_set, held_out, EvaluationSettings(layers=((1,), (2,)), positions=("all", "read"), taus=(1.0,))
    ).rows
    by_setting = {(row.layer, row.positions, row.method, row.target): row for row in rows}
    for (layer, positions, method, target), row in by_setting.items():
        other = by_setting[layer, "read" if positions == "all" else "all", method, target]
        if layer == 2:
            assert row.delta_conf == pytest.approx(other.delta_conf, abs=1e-6)
    differences = [
        abs(row.delta_cconf - by_setting[1, "read", row.method, row.target].delta_cconf)
        for key, row in by_setting.items()
        if key[:2] == (1, "all")
    ]
    assert max(differences) > 1e-4, "positions never matter at an earlier block"


def test_settings_are_chosen_on_separate_texts(tiny: Tiny, learned: Corpus, held_out: Corpus) -> None:
    model = tiny("bert")
    rest, kept = learned.split_off(0.3, seed=0)
    texts = [{text for chunk in part.chunks() for text in chunk.texts} for part in (rest, kept)]
    assert len(rest) + len(kept) == len(learned)
    assert len(kept) == round(0.3 * len(learned))
    assert sum(map(len, texts)) >= len(texts[0] | texts[1])
    range_set = fit(model, rest).range_set
    settings = EvaluationSettings(top_fractions=(0.1, 0.5, 1.0), taus=(0.5, 2.5), resamples=0)
    evaluation = evaluate(model, range_set, held_out, settings, selection=kept)
    on_kept = evaluate(model, range_set, kept, settings).rows
    assert [each.method for each in evaluation.selected] == ["neuron", "range"]
    for choice in evaluation.selected:
        means = [row for row in on_kept if row.method == choice.method and row.target == "mean"]
        best = max(means, key=lambda row: row.delta_cacc - row.delta_acc)
        assert choice.score == pytest.approx(best.delta_cacc - best.delta_acc)
        assert choice.candidates == len(means)
        assert choice.setting in {row.setting for row in evaluation.rows}
    assert evaluate(model, range_set, held_out, EvaluationSettings(), selection=kept).selected == ()


def test_stopped_evaluation_resumes_to_the_same_result(
    tiny: Tiny, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    model = tiny("bert")
    range_set = fit(model, learned).range_set
    settings = EvaluationSettings(batch_tokens=150, top_fractions=(0.3, 1.0))
    whole = evaluate(model, range_set, held_out, settings)
    grid_of = list(grid(settings, settings.resolved_layers(3), range_set.concepts))
    first_run: list[Progress] = []

    def stop_after_10_rows(now: Progress) -> None:
        first_run.append(now)
        if now.done > 10:
            raise Stopped

    with pytest.raises(Stopped):
        measure(
            model,
            MeasureTask(
                range_set,
                held_out,
                grid_of,
                settings,
                checkpoint_dir=tmp_path,
                checkpoint_seconds=0,
                progress=stop_after_10_rows,
            ),
        )
    resumed: list[Progress] = []
    again = evaluate(
        model,
        range_set,
        held_out,
        settings,
        checkpoint_dir=tmp_path,
        progress=resumed.append,
    )
    assert 0 < resumed[0].resumed <= first_run[-1].done
    assert repr(again.rows) == repr(whole.rows)
    assert list(tmp_path.iterdir()) == list(tmp_path.glob(CHECKPOINTS))


def test_progress_advances_with_every_turn_of_erasures(tiny: Tiny, learned: Corpus, held_out: Corpus) -> None:
    """All settings of one batch may take minutes."""
    model = tiny("bert")
    range_set = fit(model, learned, layers="all").range_set
    settings = EvaluationSettings(batch_tokens=2000, layers="all", top_fractions=(0.1, 0.2, 0.3, 1.0), resamples=0)
    seen: list[Progress] = []
    evaluate(model, range_set, held_out, settings, progress=seen.append)
    shares = [now.share for now in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert len({share for share, now in zip(shares, seen, strict=True) if now.done == 0}) > 5
    steps = np.diff([share for share, now in zip(shares, seen, strict=True) if now.done == 0])
    assert steps[-1] < 0.05 * steps.sum(), "erasures at the last block run no further block"


def test_number_of_settings_does_not_change_the_number_of_trunk_passes(
    tiny: Tiny, learned: Corpus, held_out: Corpus
) -> None:
    """The trunk runs once over the texts for any number of targets, methods, fractions and τ."""
    model = tiny("bert")
    range_set = fit(model, learned).range_set
    passes = []
    handle = model.steered.blocks[0].register_forward_hook(lambda module, args, output: passes.append(output.shape[1]))
    try:
        evaluate(model, range_set, held_out, EvaluationSettings(methods=("neuron",), targets=("World",)))
        one = list(passes)
        passes.clear()
        evaluate(model, range_set, held_out, EvaluationSettings(top_fractions=(0.1, 0.5, 1.0), taus=(1.0, 2.5, 4.0)))
    finally:
        handle.remove()
    assert passes == one
    texts = [text for chunk in held_out.chunks() for text in chunk.texts]
    tokens = sum(len(text.ids) for text in model.tokens.encode(texts))
    assert tokens <= sum(one) < tokens + len(one) * STEP + tokens / 16, "every token runs once, with hardly any padding"


DIES_IN_THE_MIDDLE = """
import os, signal, torch
from pathlib import Path
from typing import Any
from workers.evaluation.evaluate import evaluate
from workers.evaluation.settings import EvaluationSettings
from workers.corpora.loading import load_corpus
from workers.fitting.fit import fit
from workers.models.loading import load_model

def die_after_40_rows(now):
    if now.done > 40:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
model = load_model({source!r}, device="cpu")
learned, test = (load_corpus(path, labels=model.identity.labels) for path in ({train!r}, {test!r}))
evaluate(model, fit(model, learned).range_set, test, EvaluationSettings(batch_tokens=60),
         checkpoint_dir=Path({out!r}), checkpoint_seconds=0, progress=die_after_40_rows)
"""


def test_killed_evaluation_resumes_to_the_same_result(tmp_path: Path) -> None:
    source = str(save_tiny("bert", tmp_path / "model"))
    train = str(write_jsonl(tmp_path / "train.jsonl", labelled_texts(60, seed=1)))
    test = str(write_jsonl(tmp_path / "test.jsonl", labelled_texts(80, seed=2)))
    out = tmp_path / "out"
    killed = Running([], code=DIES_IN_THE_MIDDLE.format(source=source, train=train, test=test, out=str(out)))
    assert killed.end() == -signal.SIGKILL, killed.stderr
    model = load_model(source, device="cpu")
    range_set = fit(model, load_corpus(train, labels=LABELS)).range_set
    corpus, settings = load_corpus(test, labels=LABELS), EvaluationSettings(batch_tokens=60)
    progress: list[Progress] = []
    resumed = evaluate(model, range_set, corpus, settings, checkpoint_dir=out, progress=progress.append)
    assert progress[0].resumed > 0
    assert repr(resumed.rows) == repr(evaluate(model, range_set, corpus, settings).rows)


def test_mean_row_of_targets_without_texts_tells_of_the_others() -> None:
    truth = np.array([0, 0, 1, 1], dtype=np.int16)
    outcomes = Outcomes.empty(3, 4)
    outcomes.used[:] = True
    outcomes.base_predicted[:] = truth
    outcomes.predicted[:] = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    summary = Summary(outcomes, truth, ("a", "b"), Bootstrap(truth, resamples=50))
    foreign = [Erasure(concept=name, layers=(0,)) for name in ("Weather", "Traffic")]
    *rows, mean = summary.rows(foreign, 0, "all")
    assert [row.delta_cacc for row in rows] == [-0.25, -0.75]
    assert (mean.base_cacc, mean.delta_cacc, mean.n_target) == (1.0, -0.5, 0)
    assert mean.delta_cacc_low <= -0.5 <= mean.delta_cacc_high
    assert (mean.worst_other, mean.worst_other_delta_acc) == ("b", -1.0)
    assert all(math.isnan(each) for each in (mean.base_acc, mean.delta_acc, mean.delta_acc_low))
    *_, mixed = summary.rows([*foreign, Erasure(concept="a", layers=(0,))], 0, "all")
    assert (mixed.delta_acc, mixed.delta_cacc) == (-1.0, 0.0), "where some have texts, the others do not count"


def test_perplexity_needs_a_setting_that_masks_all_tokens(tiny: Tiny) -> None:
    with pytest.raises(EvaluationError, match="--positions all"):
        check_perplexity(tiny("bert"), EvaluationSettings(positions=("read",)))


def test_others_can_be_averaged_over_their_classes() -> None:
    truth = np.array([0, 1, 1, 1, 2], dtype=np.int16)
    outcomes = Outcomes.empty(1, 5)
    outcomes.used[:] = True
    outcomes.base_predicted[:] = truth
    outcomes.predicted[0] = [0, 1, 1, 1, 0]
    bootstrap = Bootstrap(truth, resamples=100)
    rows = {
        others: Summary(outcomes, truth, ("a", "b", "c"), bootstrap, others).rows(
            [Erasure(concept="a", layers=(0,))], 0, "all"
        )[0]
        for others in ("pooled", "classes")
    }
    assert rows["pooled"].delta_cacc == -0.25
    assert rows["classes"].delta_cacc == -0.5
    assert (rows["classes"].delta_cacc_low, rows["classes"].delta_cacc_high) == (-0.5, -0.5)


def test_unfinished_batch_is_resumed(tiny: Tiny, learned: Corpus, held_out: Corpus, tmp_path: Path) -> None:
    """One batch with many settings may take minutes, so its finished settings are saved too."""
    model = tiny("bert")
    range_set = fit(model, learned, layers="all").range_set
    settings = EvaluationSettings(layers="all", top_fractions=(0.1, 0.5, 1.0))
    tails: list[int] = []
    handle = model.steered.blocks[2].register_forward_hook(lambda module, args, output: tails.append(len(output)))
    try:
        whole = evaluate(model, range_set, held_out, settings)
        all_of_them = len(tails)

        def stop_after_8_tails(now: Progress) -> None:
            if len(tails) > 8:
                raise Stopped

        for _ in range(2):
            tails.clear()
            with pytest.raises(Stopped):
                evaluate(
                    model,
                    range_set,
                    held_out,
                    settings,
                    checkpoint_dir=tmp_path,
                    checkpoint_seconds=0,
                    progress=stop_after_8_tails,
                )
        tails.clear()
        resumed = evaluate(model, range_set, held_out, settings, checkpoint_dir=tmp_path)
    finally:
        handle.remove()
    assert repr(resumed.rows) == repr(whole.rows)
    assert len(tails) <= all_of_them - 14, "finished settings run again"
