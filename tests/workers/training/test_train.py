"""Training learns, is reproducible and resumable, and its result appears whole or not at all."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.processes import Running
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.corpus import Corpus
from workers.corpora.errors import CorpusError
from workers.corpora.loading import load_corpus
from workers.fitting.progress import Progress
from workers.models.errors import CheckpointError, TextTooLong, UnsupportedModel
from workers.models.loading import load_model
from workers.training.order import LengthPools
from workers.training.recipes import LabelToken
from workers.training.scratch import NewModel
from workers.training.train import Epoch, TrainSettings, train

LEARNED = 0.9
"""Accuracy to reach; every training here reached 1.0."""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", labelled_texts(160, seed=1))))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return load_corpus(str(write_jsonl(tmp_path_factory.mktemp("data") / "test.jsonl", labelled_texts(60, seed=2))))


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A one-block checkpoint to fine-tune."""
    return str(save_tiny("bert", tmp_path / "base", n_layers=1))


def weights(directory: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(directory / "model.safetensors").items()}


def new_model(family: str, layers: int = 1) -> NewModel:
    return NewModel(family, layers=layers, hidden=64, heads=4, vocabulary=400, max_positions=64)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fine_tuned_classifier_learns_and_can_be_loaded(
    family: str, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    base = save_tiny(family, tmp_path / "base", labels=("one", "two"), n_layers=1)
    steps: list[Progress] = []
    epochs: list[Epoch] = []
    out = tmp_path / "out"
    settings = TrainSettings(epochs=12, learning_rate=5e-3)
    report = train(str(base), learned, held_out, out, settings, progress=steps.append, epoch=epochs.append)
    assert report.accuracy is not None
    assert report.accuracy >= LEARNED
    assert not report.at_chance
    assert [(now.phase, now.done, now.total) for now in steps] == [
        *(("training", step, 120) for step in range(1, 121)), ("measuring accuracy", 1, 1), ("saving", 0, 0)
    ]  # fmt: skip
    assert [each.number for each in epochs] == list(range(1, 13))
    assert epochs[-1].loss < epochs[0].loss / 4
    assert epochs[-1].accuracy == report.learned_accuracy
    assert report.learned_accuracy is not None
    assert report.learned_accuracy >= LEARNED
    model = load_model(str(out), device="cpu")
    assert model.identity.labels == learned.concepts == report.labels
    (text,) = model.tokens.encode(["she broke the record for the third time this year"])
    logits = model.steered.logits(model.tokens.batch([text]))
    assert model.identity.labels[int(logits.argmax())] == "Sports"


def test_same_seed_gives_the_same_weights(bert: str, learned: Corpus, tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        train(bert, learned, None, tmp_path / name, TrainSettings(epochs=0.3, seed=seed))
    assert weights(tmp_path / "again") == weights(tmp_path / "first")
    assert weights(tmp_path / "other") != weights(tmp_path / "first")


def test_existing_output_is_overwritten_only_on_request(bert: str, learned: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep me")
    with pytest.raises(CheckpointError, match="--overwrite"):
        train(bert, learned, None, out, TrainSettings(epochs=0.1))
    assert (out / "precious").read_text() == "keep me"
    train(bert, learned, None, out, TrainSettings(epochs=0.1), overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "precious").exists()


def test_only_one_training_writes_to_a_directory(bert: str, learned: Corpus, tmp_path: Path) -> None:
    """A second one, with whatever arguments, would remove the checkpoints of the first, or replace what it made."""
    out, settings = tmp_path / "out[1]", TrainSettings(epochs=0.1)
    refused = []

    def start_another(now: Progress) -> None:
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="another process is training"):
                train(bert, learned, None, out, replace(settings, seed=1), overwrite=overwrite)
            refused.append(now)

    train(bert, learned, None, out, settings, progress=start_another)
    assert refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out[1]"]


def test_directory_that_was_filled_meanwhile_is_kept(bert: str, learned: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fill(now: Progress) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(CheckpointError, match="--overwrite"):
        train(bert, learned, None, out, TrainSettings(epochs=0.1), progress=fill)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_warns_about_labels_with_few_texts(bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("the cup", "Sports")] * 6 + [("the cup", "World")] * 6 + [("", "Other")]
    data = load_corpus(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    report = train(bert, data, None, tmp_path / "out", TrainSettings(epochs=1))
    assert report.at_chance
    assert "rows.jsonl: only one row has the label 'Other'" in caplog.text
    assert "rows.jsonl: 1 of 13 texts are empty" in caplog.text
    one = load_corpus(str(write_jsonl(tmp_path / "one.jsonl", rows[:6])))
    with pytest.raises(CorpusError, match=r"all rows of one\.jsonl have the label 'Sports': .* two or more"):
        train(bert, one, None, tmp_path / "other", TrainSettings(epochs=1))


def test_training_stopped_before_a_checkpoint_leaves_no_files(bert: str, learned: Corpus, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(now: Progress) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(bert, learned, None, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_bad_bases_and_unknown_labels_are_rejected(bert: str, learned: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        train(str(tmp_path / "nothing"), learned, None, tmp_path / "out")
    other = load_corpus(str(write_jsonl(tmp_path / "other.jsonl", [("a", "Weather")])))
    with pytest.raises(CorpusError, match="Weather"):
        train(bert, learned, other, tmp_path / "out")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnsupportedModel, match="t5"):
        train(str(tmp_path / "t5"), learned, None, tmp_path / "out")


LABEL_TOKEN = TrainSettings(recipe="label-token", epochs=5, learning_rate=5e-3, batch_size=8)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_new_language_model_learns_label_tokens(family: str, learned: Corpus, held_out: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = train(new_model(family), learned, held_out, out, LABEL_TOKEN)
    assert report.accuracy is not None
    assert report.accuracy >= LEARNED
    model = load_model(str(out), device="cpu")
    assert (model.identity.kind, model.identity.labels) == ("label-token", learned.concepts)
    lm = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("she broke the record")["input_ids"] + [tokenizer.convert_tokens_to_ids("<sep>")]
    scores = lm(torch.tensor([ids])).logits[0, -1]
    assert tokenizer.decode([int(scores.argmax())]) == "<label:Sports>"
    (text,) = model.tokens.encode(["she broke the record"])
    assert list(text.ids) == ids
    chosen = scores[[tokenizer.convert_tokens_to_ids(f"<label:{label}>") for label in learned.concepts]]
    torch.testing.assert_close(model.steered.logits(model.tokens.batch([text]))[0], chosen, atol=1e-5, rtol=0)


def test_causal_checkpoint_is_fine_tuned_with_label_tokens(
    bert: str, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    first = train(new_model("gpt2"), learned, None, tmp_path / "first", replace(LABEL_TOKEN, epochs=0.1))
    report = train(str(first.out), learned, held_out, tmp_path / "second", LABEL_TOKEN)
    assert report.accuracy is not None
    assert report.accuracy >= LEARNED
    with pytest.raises(CheckpointError, match="not a causal language model"):
        train(bert, learned, None, tmp_path / "third", LABEL_TOKEN)
    assert not (tmp_path / "third").exists()


def test_loss_is_that_of_the_label_token_alone(learned: Corpus) -> None:
    """The loss equals that of transformers over `text <sep> label <eos>` with every other position ignored."""
    torch.manual_seed(0)
    task = LabelToken.of(new_model("gpt2", layers=2), learned)
    task.model.eval()
    rows = task.rows(learned, None).select(range(7))
    batch = task.collator([rows[n] for n in range(7)])
    loss, logits = task.loss(task.model, dict(batch))
    assert logits.shape == (7, len(learned.concepts))
    total = 0.0
    for row in rows:
        ids = [*row["input_ids"], task.tokens.ids[row["labels"]], task.tokenizer.eos_token_id]
        labels = torch.full((1, len(ids)), -100)
        labels[0, -2] = ids[-2]
        total += float(task.model(input_ids=torch.tensor([ids]), labels=labels).loss)
    assert float(loss) == pytest.approx(total / 7, abs=1e-5)


def test_truncated_text_keeps_its_separator(learned: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = LabelToken.of(NewModel("llama", layers=1, hidden=32, heads=4, vocabulary=400, max_positions=16), learned)
    rows = task.rows(learned, None)
    assert max(map(len, rows["input_ids"])) == 16
    assert all(ids[-1] == task.tokens.sep for ids in rows["input_ids"])
    task.model.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    tokens = load_model(str(tmp_path), device="cpu").tokens
    (text,) = tokens.encode(["a long night " * 50])
    assert (len(text.ids), text.ids[-1], text.truncated) == (16, task.tokens.sep, True)
    with pytest.raises(TextTooLong):
        tokens.encode(["a long night " * 50], truncate=False)
    (empty,) = tokens.encode([""])
    assert empty.ids == (task.tokens.sep,)


DIES_AT_STEP_7 = """
import os, signal, torch
from pathlib import Path
from workers.corpora.loading import load_corpus
from workers.fitting.progress import Progress
from workers.training.train import TrainSettings, train

def die_at_step_7(now):
    if now.done == 7:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
train({base!r}, load_corpus({data!r}), None, Path({out!r}), TrainSettings(epochs=4, seed=5), checkpoint_seconds=0,
      progress=die_at_step_7)
"""


def test_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Three steps an epoch: step 7 is in the third of four epochs."""
    base = str(save_tiny("bert", tmp_path / "base", n_layers=1))
    data = str(write_jsonl(tmp_path / "train.jsonl", labelled_texts(48, seed=1)))
    out = tmp_path / "out"
    killed = Running([], code=DIES_AT_STEP_7.format(base=base, data=data, out=str(out)))
    assert killed.end() == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    settings = TrainSettings(epochs=4, seed=5)
    steps: list[Progress] = []
    train(base, load_corpus(data), None, out, settings, progress=steps.append)
    assert [(step.phase, step.resumed) for step in steps] == [*[("training", 6)] * 6, ("saving", 6)]
    train(base, load_corpus(data), None, tmp_path / "whole", settings)
    assert weights(out) == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "train.jsonl", "whole"]


def test_every_epoch_has_each_row_once_in_a_new_order() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 60, size=333)]
    order = LengthPools(lengths, batch=16, seed=1)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(333))
        assert list(order) == epochs[-1]
    assert epochs[0] != epochs[1]
    batches = [epochs[0][start : start + 16] for start in range(0, 333, 16)]
    padding = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches) - sum(lengths)
    assert padding < 0.15 * sum(lengths)


def test_new_model_takes_a_config_and_rejects_invalid_sizes(learned: Corpus, tmp_path: Path) -> None:
    settings = TrainSettings(recipe="label-token", epochs=0.1)
    out = tmp_path / "out"
    model = replace(new_model("gpt2", layers=2), config='{"n_inner": 48, "activation_function": "relu"}')
    train(model, learned, None, out, settings)
    lm = AutoModelForCausalLM.from_pretrained(out)
    assert (lm.config.n_inner, lm.config.activation_function, lm.config.n_layer) == (48, "relu", 2)
    for invalid, message in (
        (new_model("bert"), "gpt2, llama, qwen2"),
        (replace(new_model("gpt2"), heads=5), "heads"),
        (replace(new_model("gpt2"), config="{"), "sizes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(invalid, learned, None, tmp_path / "none", settings)
    with pytest.raises(CheckpointError, match="label-token"):
        train(new_model("gpt2"), learned, None, tmp_path / "none", TrainSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
