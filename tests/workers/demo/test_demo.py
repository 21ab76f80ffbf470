"""The demo trains, fits and measures once, and erasing by range removes the target and spares the others."""

import os
import shutil
from pathlib import Path

import pytest
import redis

from range_store.storage.store import RangeStore
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.corpus import Corpus
from workers.corpora.loading import load_corpus
from workers.demo import demo
from workers.demo.demo import CONCEPTS, Demo, prepare
from workers.demo.minilm import DemoError, minilm_directory
from workers.evaluation.evaluate import EvaluationSettings, evaluate
from workers.evaluation.measures import Row
from workers.fitting.fit import fit


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace MiniLM and the corpus of the demo by a tiny checkpoint and a few sentences; gives a directory to use."""
    for split, seed in (("train", 1), ("test", 2)):
        write_jsonl(tmp_path / f"{split}.jsonl", labelled_texts(48, seed))
    base = save_tiny("bert", tmp_path / "base", n_layers=1)
    monkeypatch.setattr(demo, "CORPUS", tmp_path)
    monkeypatch.setattr(demo, "minilm_directory", lambda: base)
    return tmp_path / "demo"


def test_second_start_neither_trains_nor_fits(tiny_demo: Path, redis_client: redis.Redis) -> None:
    store = RangeStore(redis_client, "tiny-demo-test")
    done: list[str] = []

    def start(rebuild: bool = False) -> Demo:
        done.clear()
        return prepare(tiny_demo, store, lambda what, *now: done.append(what), rebuild=rebuild)

    first = start()
    steps = ["training MiniLM", "fitting ranges", "measuring on held-out sentences"]
    assert list(dict.fromkeys(done)) == steps
    assert store.live_state().range_set == first.range_set
    assert first.model.identity.labels == CONCEPTS
    assert {row.target for row in first.evaluation.rows} == {*CONCEPTS, "mean"}
    second = start()
    assert set(done) == {"measuring on held-out sentences"}
    assert second.range_set == first.range_set
    assert second.evaluation.rows == first.evaluation.rows
    start(rebuild=True)
    assert list(dict.fromkeys(done)) == steps
    shutil.rmtree(tiny_demo)
    assert start().model.identity.fingerprint == first.model.identity.fingerprint, "training is not reproducible"


def test_unknown_weights_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (minilm_directory() / "model.safetensors").is_file()
    monkeypatch.setattr("workers.demo.minilm.SHA256", "0" * 64)
    with pytest.raises(DemoError, match="sha256"):
        minilm_directory()


def mean(demo: Demo, method: str) -> Row:
    (row,) = [row for row in demo.evaluation.rows if row.target == "mean" and row.method == method]
    assert row.top_fraction == 1.0
    return row


@pytest.mark.full
def test_range_masking_removes_the_target_and_spares_the_others(made: Demo) -> None:
    """Training is seeded: other machines round differently, which may change a few of the 212 test texts."""
    ranged, neuron = mean(made, "range"), mean(made, "neuron")
    assert made.accuracy == pytest.approx(0.986, abs=0.02)
    assert ranged.delta_acc == pytest.approx(-0.67, abs=0.05)
    assert ranged.delta_cacc == pytest.approx(0.0, abs=0.02)
    assert neuron.delta_cacc == pytest.approx(-0.736, abs=0.05)


def ag_news(split: str, rows: int) -> Corpus:
    path = Path(os.environ["DATA"]) / "ag_news" / f"{split}.jsonl"
    return load_corpus(str(path), labels=CONCEPTS, label_map={"Sci/Tech": "SciTech"}, max_rows=rows)


@pytest.mark.full
@pytest.mark.data
def test_claims_hold_on_published_news(made: Demo) -> None:
    """The classifier never saw AG-News."""
    ranges = fit(made.model, ag_news("train", 1200)).range_set
    settings = EvaluationSettings(top_fractions=(0.3, 1.0))
    rows = evaluate(made.model, ranges, ag_news("test", 500), settings).rows
    means = {(row.method, row.top_fraction): row for row in rows if row.target == "mean"}
    assert means["range", 1.0].base_acc > 0.7
    assert means["range", 1.0].delta_acc < -0.4
    assert means["range", 1.0].delta_cacc > -0.1
    assert means["neuron", 1.0].delta_cacc < -0.4
    for fraction in (0.3, 1.0):
        ranged, neuron = means["range", fraction], means["neuron", fraction]
        assert ranged.delta_cconf >= neuron.delta_cconf - 0.01, "ranges hurt the other classes more"
