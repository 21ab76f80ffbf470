"""The demo's claim: erasing by range takes the target and spares the others, on its sentences and on AG-News.

One file, so that the demo is made once (METHOD "Seen on real text").
"""

import os
from pathlib import Path

import pytest
import redis

from range_store.store import RangeStore
from workers.demo.demo import CONCEPTS, Demo, prepare
from workers.demo.minilm import DemoError, minilm_directory
from workers.evaluation.evaluate import EvaluationSettings, evaluate
from workers.evaluation.measures import Row
from workers.fitting.corpus import Corpus, load_corpus
from workers.fitting.fit import fit


def mean(demo: Demo, method: str) -> Row:
    (row,) = [row for row in demo.evaluation.rows if row.target == "mean" and row.method == method]
    assert row.top_fraction == 1.0
    return row


def test_the_classifier_learned_its_concepts(made: tuple[Path, Demo]) -> None:
    assert made[1].accuracy >= 0.85


def test_range_masking_takes_the_target_and_spares_the_others(made: tuple[Path, Demo]) -> None:
    row = mean(made[1], "range")
    assert row.delta_acc <= -0.4
    assert row.delta_cacc >= -0.1


def test_neuron_masking_takes_the_others_down_too(made: tuple[Path, Demo]) -> None:
    assert mean(made[1], "neuron").delta_cacc <= -0.3


def test_the_second_start_trains_and_fits_nothing(made: tuple[Path, Demo], redis_client: redis.Redis) -> None:
    directory, first = made
    done: list[str] = []
    again = prepare(directory, RangeStore(redis_client, "demo-test"), lambda what, *now: done.append(what))
    assert set(done) == {"measuring on held-out sentences"}
    assert again.range_set == first.range_set
    assert again.evaluation.rows == first.evaluation.rows


def test_weights_that_are_not_the_known_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (minilm_directory() / "model.safetensors").is_file()
    monkeypatch.setattr("workers.demo.minilm.SHA256", "0" * 64)
    with pytest.raises(DemoError, match="sha256"):
        minilm_directory()


def ag_news(split: str, rows: int) -> Corpus:
    path = Path(os.environ.get("DATA", "")) / "ag_news" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip("no $DATA/ag_news on this machine")
    return load_corpus(str(path), labels=CONCEPTS, label_map={"Sci/Tech": "SciTech"}, max_rows=rows)


@pytest.mark.data
def test_on_text_that_nobody_here_wrote_too(made: tuple[Path, Demo]) -> None:
    model = made[1].model
    ranges = fit(model, ag_news("train", 1200)).range_set
    settings = EvaluationSettings(top_fractions=(0.3, 1.0))
    rows = evaluate(model, ranges, ag_news("test", 500), settings).rows
    means = {(row.method, row.top_fraction): row for row in rows if row.target == "mean"}
    assert means["range", 1.0].base_acc > 0.7, "the classifier never saw AG-News, and still reads it"
    assert means["range", 1.0].delta_acc < -0.4
    assert means["range", 1.0].delta_cacc > -0.1
    assert means["neuron", 1.0].delta_cacc < -0.4
    for fraction in (0.3, 1.0):
        ranged, neuron = means["range", fraction], means["neuron", fraction]
        assert ranged.delta_cconf >= neuron.delta_cconf - 0.01, "ranges never hurt the others more"
