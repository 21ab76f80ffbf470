"""Training: it learns, it repeats, and its result appears whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.corpus import Corpus, CorpusError, load_corpus
from workers.models.errors import CheckpointError, TextTooLong, UnsupportedModel
from workers.models.loading import load_model
from workers.training.order import LengthPools
from workers.training.recipes import LabelToken
from workers.training.scratch import NewModel
from workers.training.train import TrainingCancelled, TrainProgress, TrainSettings, train


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
    report = train(
        str(base), learned, held_out, out, TrainSettings(epochs=20, learning_rate=2e-3), progress=told.append
    )
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
        train(base, learned, None, tmp_path / name, TrainSettings(epochs=0.5, seed=seed))
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
        train(base, learned, None, out, TrainSettings(epochs=0.1))
    assert (out / "precious").read_text() == "keep me"
    train(base, learned, None, out, TrainSettings(epochs=0.1), overwrite=True)
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


LABEL_TOKEN = TrainSettings(recipe="label-token", epochs=12, learning_rate=3e-3, batch_size=16)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_small_language_model_learns_label_tokens_from_nothing(
    family: str, learned: Corpus, held_out: Corpus, tmp_path: Path
) -> None:
    new = NewModel(family, layers=2, hidden=32, heads=4, vocabulary=400, max_positions=64)
    out = tmp_path / "out"
    report = train(new, learned, held_out, out, LABEL_TOKEN)
    assert report.accuracy is not None
    assert report.accuracy > 0.8, "every clause belongs to one concept only; chance is 0.3"
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
    torch.testing.assert_close(model.steered.logits(model.tokens.pad([text.ids]))[0], chosen, atol=1e-5, rtol=0)


def test_a_causal_checkpoint_is_fine_tuned_with_label_tokens(learned: Corpus, held_out: Corpus, tmp_path: Path) -> None:
    first = train(
        NewModel("gpt2", layers=2, hidden=32, heads=4, vocabulary=400, max_positions=64),
        learned,
        None,
        tmp_path / "first",
        TrainSettings(recipe="label-token", epochs=0.1),
    )
    report = train(str(first.out), learned, held_out, tmp_path / "second", LABEL_TOKEN)
    assert report.accuracy is not None
    assert report.accuracy > 0.8
    bert = save_tiny("bert", tmp_path / "bert")
    with pytest.raises(CheckpointError, match="no causal language model"):
        train(str(bert), learned, None, tmp_path / "third", LABEL_TOKEN)
    assert not (tmp_path / "third").exists()


def test_the_loss_is_that_of_the_label_token_alone(learned: Corpus) -> None:
    """The same as transformers' own loss over `text <sep> label <eos>` with every other position left out."""
    torch.manual_seed(0)
    task = LabelToken.of(NewModel("gpt2", layers=2, hidden=32, heads=4, vocabulary=400, max_positions=64), learned)
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


def test_a_cut_text_keeps_its_sep(learned: Corpus, tmp_path: Path) -> None:
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


KILLED = """
import sys
import time
import torch
torch.set_num_threads(1)
from pathlib import Path
from workers.fitting.corpus import load_corpus
from workers.training.order import LengthPools
from workers.training.recipes import LabelToken
from workers.training.scratch import NewModel
from workers.training.train import TrainSettings, train
base, data, out = sys.argv[1:]
train(base, load_corpus(data), None, Path(out), TrainSettings(epochs=8, seed=5), checkpoint_seconds=0,
      progress=lambda now: (print(now.steps_done, flush=True), now.steps_done == 27 and time.sleep(120)))
"""


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    base = save_tiny("bert", tmp_path / "base")
    data = write_jsonl(tmp_path / "train.jsonl", labelled_texts(160, seed=1))
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(base), str(data), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 27:  # in the third epoch
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not (tmp_path / "out").exists()
    settings = TrainSettings(epochs=8, seed=5)
    told: list[TrainProgress] = []
    train(str(base), load_corpus(str(data)), None, tmp_path / "out", settings, progress=told.append)
    assert told[0].resumed_steps >= 20
    train(str(base), load_corpus(str(data)), None, tmp_path / "whole", settings)
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert {key: array.tobytes() for key, array in resumed.items()} == {k: a.tobytes() for k, a in whole.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "train.jsonl", "whole"]


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
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


def test_a_new_model_takes_further_settings_and_says_which_do_not_fit(learned: Corpus, tmp_path: Path) -> None:
    settings = TrainSettings(recipe="label-token", epochs=0.1)
    sizes = {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 400, "max_positions": 64}
    out = tmp_path / "out"
    train(
        NewModel("gpt2", **sizes, config='{"n_inner": 48, "activation_function": "relu"}'), learned, None, out, settings
    )
    lm = AutoModelForCausalLM.from_pretrained(out)
    assert (lm.config.n_inner, lm.config.activation_function, lm.config.n_layer) == (48, "relu", 2)
    for new, said in (
        (NewModel("bert", **sizes), "gpt2, llama, qwen2"),
        (NewModel("gpt2", **{**sizes, "heads": 5}), "heads"),
        (NewModel("gpt2", **sizes, config="{"), "sizes"),
    ):
        with pytest.raises(CheckpointError, match=said):
            train(new, learned, None, tmp_path / "none", settings)
    with pytest.raises(CheckpointError, match="label-token"):
        train(NewModel("gpt2", **sizes), learned, None, tmp_path / "none", TrainSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
