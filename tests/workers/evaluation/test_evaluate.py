"""The evaluation against a plain loop: one text at a time, one full hooked pass per setting, no shared trunk."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from range_store.erasure import Erasure
from range_store.plan import resolve
from range_store.range_set import RangeSet
from tests.workers.checkpoints import LABELS
from tests.workers.texts import labelled_texts, write_jsonl
from workers.evaluation.evaluate import EvaluationCancelled, EvaluationError, EvaluationSettings, evaluate
from workers.evaluation.measures import ClassSums
from workers.fitting.corpus import Corpus, CorpusError, load_corpus
from workers.fitting.fit import fit
from workers.models.loading import LoadedModel
from workers.models.tokens import TokenBatch

Tiny = Callable[[str], LoadedModel]


class Hooked:
    """Masking of one erasure, written out from METHOD "Masking"."""

    def __init__(self, range_set: RangeSet, erasure: Erasure) -> None:
        plan = resolve(range_set, [erasure])
        (self.layer,) = plan.masks
        self.layers = (self.layer,)
        self.mask = plan.masks[self.layer]

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
        for block in held_out.blocks()
        for text, concept in zip(block.texts, block.concepts, strict=True)
    ]
    truth = np.array([LABELS.index(concept) for _, concept in texts])
    alone = [model.tokens.pad([model.tokens.encode([text])[0].ids]) for text, _ in texts]
    bare = torch.cat([model.steered.logits(batch) for batch in alone]).softmax(dim=1).numpy()
    # 2 rankings × (neuron + range at two τ) × 2 fractions × (4 targets and their mean), at each of three layers
    assert len(evaluation.rows) == 3 * 2 * 3 * 2 * 5
    for row in evaluation.rows[:: 7 if family == "gpt2" else 3]:
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


def test_files_are_json_and_name_every_choice(tiny: Tiny, learned: Corpus, held_out: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    evaluation = evaluate(model, fit(model, learned).range_set, held_out, EvaluationSettings(targets=("Sports",)))
    evaluation.write(tmp_path / "deep" / "out")
    rows = json.loads((tmp_path / "deep" / "out" / "results.json").read_text())
    names = "layer ranking method tau top_fraction target n_target n_others"
    measures = "base_acc base_conf base_cacc base_cconf delta_acc delta_conf delta_cacc delta_cconf"
    assert all(list(row) == f"{names} {measures}".split() for row in rows)
    assert [row["target"] for row in rows] == ["Sports", "mean"] * 2
    run = json.loads((tmp_path / "deep" / "out" / "run.json").read_text())
    assert run["settings"]["layers"] == [2]
    assert run["range_set"]["model"]["fingerprint"] == model.identity.fingerprint
    assert run["test"]["rows"] == len(held_out)


def test_a_class_without_test_texts_is_null_and_not_zero(tiny: Tiny, learned: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    some = [pair for pair in labelled_texts(30, seed=3) if pair[1] != "World"]
    test = load_corpus(str(write_jsonl(tmp_path / "some.jsonl", some)), labels=LABELS)
    rows = evaluate(model, fit(model, learned).range_set, test, EvaluationSettings(methods=("range",))).rows
    world, mean = rows[0], rows[-1]
    assert world.target == "World"
    assert (world.n_target, world.as_json()["base_acc"], world.as_json()["delta_acc"]) == (0, None, None)
    assert not math.isnan(mean.delta_acc)


def test_labels_that_the_model_lacks_are_an_error_with_both_sides(
    tiny: Tiny, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    model = tiny("bert")
    range_set = fit(model, learned).range_set
    path = write_jsonl(tmp_path / "other.jsonl", [("a goal", "Sport"), ("a vote", "World")])
    with pytest.raises(CorpusError, match=r"Sport.*SciTech"):
        evaluate(model, range_set, load_corpus(str(path), labels=LABELS), EvaluationSettings())
    with pytest.raises(EvaluationError, match=r"Weather.*World"):
        evaluate(model, range_set, held_out, EvaluationSettings(targets=("Weather",)))


def test_it_can_be_cancelled(tiny: Tiny, learned: Corpus, held_out: Corpus) -> None:
    model = tiny("bert")
    with pytest.raises(EvaluationCancelled):
        evaluate(model, fit(model, learned).range_set, held_out, EvaluationSettings(), cancelled=lambda: True)


def test_confidence_is_the_probability_of_the_true_label_even_for_huge_logits() -> None:
    sums = ClassSums(3)
    sums.add(np.array([[1e4, 0, 0], [0, 1e4, 0]], dtype=np.float32), np.array([0, 0]))
    only_first = np.array([True, False, False])
    assert sums.accuracy(only_first) == 0.5
    assert sums.mean_confidence(only_first) == 0.5
    assert math.isnan(sums.accuracy(~only_first))
