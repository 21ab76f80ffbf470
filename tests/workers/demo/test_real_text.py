"""The claim on text that nobody here wrote: AG-News, under the demo's classifier (METHOD "Seen on real text")."""

import os
from pathlib import Path

import pytest

from workers.demo.demo import CONCEPTS, Demo
from workers.evaluation.evaluate import EvaluationSettings, evaluate
from workers.fitting.corpus import Corpus, load_corpus
from workers.fitting.fit import fit

pytestmark = pytest.mark.data


def ag_news(split: str, rows: int) -> Corpus:
    path = Path(os.environ.get("DATA", "")) / "ag_news" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip("no $DATA/ag_news on this machine")
    return load_corpus(str(path), labels=CONCEPTS, label_map={"Sci/Tech": "SciTech"}, max_rows=rows)


def test_range_masking_spares_the_others_on_ag_news(made: tuple[Path, Demo]) -> None:
    model = made[1].model
    ranges = fit(model, ag_news("train", 1200)).range_set
    settings = EvaluationSettings(top_fractions=(0.3, 1.0))
    rows = evaluate(model, ranges, ag_news("test", 500), settings).rows
    mean = {(row.method, row.top_fraction): row for row in rows if row.target == "mean"}
    assert mean["range", 1.0].base_acc > 0.7, "the classifier never saw AG-News, and still reads it"
    assert mean["range", 1.0].delta_acc < -0.4
    assert mean["range", 1.0].delta_cacc > -0.1
    assert mean["neuron", 1.0].delta_cacc < -0.4
    for fraction in (0.3, 1.0):
        ranged, neuron = mean["range", fraction], mean["neuron", fraction]
        assert ranged.delta_cconf >= neuron.delta_cconf - 0.01, "ranges never hurt the others more"
