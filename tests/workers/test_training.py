"""Training: it learns, it repeats, and its result appears whole or not at all."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.corpus import Corpus, CorpusError, load_corpus
from workers.models.errors import CheckpointError, UnsupportedModel
from workers.models.loading import load_model
from workers.training import TrainingCancelled, TrainProgress, train


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", labelled_texts(160, seed=1))))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_jsonl(tmp_path_factory.mktemp("data") / "test.jsonl", labelled_texts(60, seed=2))))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_learns_and_can_be_served(family: str, learned: Corpus, held_out: Corpus, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", labels=("one", "two"))
    told: list[TrainProgress] = []
    out = tmp_path / "out"
    report = train(str(base), learned, held_out, out, epochs=20, learning_rate=2e-3, progress=told.append)
    assert report.accuracy is not None
    assert report.accuracy > 0.8, "every clause belongs to one concept only; chance is 0.3"
    assert (told[-1].steps_done, told[-1].steps_total) == (200, 200)
    model = load_model(str(out), device="cpu")
    assert model.identity.labels == learned.concepts == report.labels
    (text,) = model.tokens.encode(["she broke the record for the third time this year"])
    logits = model.steered.logits(model.tokens.pad([text.ids]))
    assert model.identity.labels[int(logits.argmax())] == "Sports"


def test_the_same_seed_gives_the_same_weights(learned: Corpus, tmp_path: Path) -> None:
    base = str(save_tiny("bert", tmp_path / "base"))

    def weights(name: str, seed: int) -> dict[str, bytes]:
        train(base, learned, None, tmp_path / name, epochs=0.5, seed=seed)
        return {key: array.tobytes() for key, array in load_file(tmp_path / name / "model.safetensors").items()}

    first = weights("first", 3)
    assert weights("again", 3) == first
    assert weights("other", 4) != first


def test_what_is_there_is_not_overwritten_unasked(learned: Corpus, tmp_path: Path) -> None:
    base = str(save_tiny("bert", tmp_path / "base"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep me")
    with pytest.raises(CheckpointError, match="--overwrite"):
        train(base, learned, None, out, epochs=0.1)
    assert (out / "precious").read_text() == "keep me"
    train(base, learned, None, out, epochs=0.1, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "precious").exists()


def test_a_cancelled_training_leaves_nothing(learned: Corpus, tmp_path: Path) -> None:
    base = str(save_tiny("bert", tmp_path / "base"))
    with pytest.raises(TrainingCancelled):
        train(base, learned, None, tmp_path / "out", cancelled=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_bad_bases_and_unmatched_labels(learned: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        train(str(tmp_path / "nothing"), learned, None, tmp_path / "out")
    other = load_corpus(str(write_jsonl(tmp_path / "other.jsonl", [("a", "Weather")])))
    with pytest.raises(CorpusError, match="Weather"):
        train(str(save_tiny("bert", tmp_path / "base")), learned, other, tmp_path / "out")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnsupportedModel, match="t5"):
        train(str(tmp_path / "t5"), learned, None, tmp_path / "out")
