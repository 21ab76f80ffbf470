"""Loading takes safetensors with a trained head, gives a fingerprint of config and weights, and has clear errors."""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig

from tests.workers.checkpoints import LABELS, SENTENCES, save_language_model, save_tiny
from workers.models.errors import CheckpointError, EmptyText, TextTooLong, UnknownToken, UnsupportedModel
from workers.models.loading import LoadedModel, load_model
from workers.models.tokens import Encoded, TextTokenizer

Tiny = Callable[[str], LoadedModel]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny("bert", tmp_path / "tiny-bert")


def test_identity_describes_the_checkpoint(checkpoint: Path) -> None:
    identity = load_model(str(checkpoint), device="cpu").identity
    assert identity.id == "tiny-bert"
    assert identity.labels == LABELS
    assert (identity.n_layers, identity.hidden_size, identity.family) == (3, 32, "bert")


def test_fingerprint_depends_on_config_and_weights_only(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    first = load_model(str(checkpoint), device="cpu").identity.fingerprint
    assert load_model(str(copy), device="cpu").identity.fingerprint == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert load_model(str(copy), device="cpu").identity.fingerprint != first
    other = save_tiny("bert", tmp_path / "other", labels=("a", "b", "c", "d"))
    assert load_model(str(other), device="cpu").identity.fingerprint != first


def test_fingerprint_hashes_what_the_checkpoint_says(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults of the library are no part of it: a new release may add some."""
    before = load_model(str(checkpoint), device="cpu")
    said = json.loads((checkpoint / "config.json").read_text())
    for left_out in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        said.pop(left_out, None)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (
        before.identity.fingerprint == hashlib.sha256(json.dumps(said, sort_keys=True).encode() + weights).hexdigest()
    )
    monkeypatch.setattr(BertConfig, "of_a_new_release", 7, raising=False)
    whole = BertConfig.to_dict
    monkeypatch.setattr(BertConfig, "to_dict", lambda self: whole(self) | {"of_a_new_release": 7})
    after = load_model(str(checkpoint), device="cpu")
    assert after.identity.fingerprint == before.identity.fingerprint
    assert after.earlier_fingerprint != before.earlier_fingerprint


def test_fingerprint_of_earlier_versions_is_known(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), device="cpu")
    whole = AutoConfig.from_pretrained(checkpoint).to_dict()
    for left_out in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        whole.pop(left_out, None)
    weights = (checkpoint / "model.safetensors").read_bytes()
    hashed = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode() + weights).hexdigest()
    assert model.earlier_fingerprint == model.facts.earlier_fingerprint == hashed
    assert hashed != model.identity.fingerprint


def test_pickled_weights_are_rejected_unless_allowed(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    expected = load_model(str(checkpoint), device="cpu")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="allow-pickle"):
        load_model(str(checkpoint), device="cpu")
    pickled = load_model(str(checkpoint), device="cpu", allow_pickle=True)
    batch = pickled.tokens.batch(pickled.tokens.encode(SENTENCES))
    assert torch.equal(pickled.steered.logits(batch), expected.steered.logits(batch))


def test_remote_code_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (checkpoint / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((checkpoint / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    config["auto_map"] = dict.fromkeys(names, "modeling_evil.Evil")
    (checkpoint / "config.json").write_text(json.dumps(config))
    load_model(str(checkpoint), device="cpu")
    config["model_type"] = "evil"
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, UnsupportedModel)):
        load_model(str(checkpoint), device="cpu")
    assert not ran.exists()


def test_model_without_a_trained_head_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(checkpoint).save_pretrained(bare)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, bare)
    with pytest.raises(CheckpointError, match="neuronlens train"):
        load_model(str(bare), device="cpu")


def test_unsupported_missing_and_corrupt_models_give_one_line_errors(checkpoint: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("albert", vocab_size=50, hidden_size=32, num_attention_heads=4)
    config.save_pretrained(tmp_path / "albert")
    with pytest.raises(UnsupportedModel, match=r"albert.*supported: bert"):
        load_model(str(tmp_path / "albert"), device="cpu")
    with pytest.raises(CheckpointError) as missing:
        load_model(str(tmp_path / "nowhere"), device="cpu")
    assert "\n" not in str(missing.value)
    (checkpoint / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(CheckpointError) as corrupt:
        load_model(str(checkpoint), device="cpu")
    assert "\n" not in str(corrupt.value)


def test_bfloat16_model_gives_bfloat16_logits(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), device="cpu", dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert model.steered.splits
    batch = model.tokens.batch(model.tokens.encode(SENTENCES))
    assert model.steered.logits(batch).dtype == torch.bfloat16


def test_long_texts_are_truncated_to_the_model_or_rejected(tiny: Tiny) -> None:
    for family in ("bert", "roberta", "gpt2"):
        model = tiny(family)
        long = "goal " * 500
        cut, whole = model.tokens.encode([long, "goal"])
        assert cut.truncated
        assert len(cut.ids) == model.tokens.max_tokens
        assert not whole.truncated
        assert torch.isfinite(model.steered.logits(model.tokens.batch([cut, whole]))).all()
        if family != "gpt2":
            assert cut.ids[-1] == whole.ids[-1], "truncation keeps the closing special token"
        with pytest.raises(TextTooLong, match="input 1"):
            model.tokens.encode(["goal", long], truncate=False)


def test_empty_text_is_rejected_by_models_without_special_tokens(tiny: Tiny) -> None:
    assert len(tiny("bert").tokens.encode([""])[0].ids) == 2
    with pytest.raises(EmptyText, match="input 1"):
        tiny("llama").tokens.encode(["goal", ""])


def test_tokenizer_accepts_odd_characters(tiny: Tiny) -> None:
    for family in ("bert", "qwen2"):
        texts = ["\ud800 lone", "nul \x00 byte", "emoji 🏆", "\u202e right to left", " \t\n goal "]
        assert all(text.ids for text in tiny(family).tokens.encode(texts))


def test_read_position_when_pad_and_eos_are_the_same_id(tiny: Tiny) -> None:
    """Of a text that ends in the eos token, the head of transformers reads the token before it."""
    model = tiny("gpt2")
    eos = model.tokens.pad_id
    ids = model.tokens.encode(["Voters queued before dawn"])[0].ids
    batch = model.tokens.batch([Encoded((*ids, eos)), Encoded(ids[:3])])
    assert batch.read.tolist() == [len(ids) - 1, 2]
    last = model.identity.n_layers - 1
    assert batch.mask[0].all()
    _, states = model.steered.record(batch, [last])
    with torch.inference_mode():
        head = model.steered.model.score(model.steered.model.transformer.ln_f(states[last]))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(head, model.steered.logits(batch))


def test_what_a_checkpoint_lacks_is_told_once(tmp_path: Path) -> None:
    """By our error; transformers would print a table of weights too."""
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign, assignment]
    logging.getLogger("transformers").addHandler(listener)
    try:
        with pytest.raises(CheckpointError, match="is not a trained sequence classifier"):
            load_model(str(save_language_model("gpt2", tmp_path / "lm")), device="cpu")
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert said == []


def rewrite(directory: Path, name: str = "config.json", **entries: object) -> Path:
    """Set entries of a JSON file of a checkpoint."""
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return directory


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "workers.models.loading"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("pad", [-1, 10**6])
def test_pad_id_outside_the_vocabulary_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, pad: int
) -> None:
    checkpoint = save_tiny(family, tmp_path / family)
    right = load_model(str(checkpoint), device="cpu")
    model = load_model(str(rewrite(checkpoint, pad_token_id=pad)), device="cpu")
    (said,) = warnings_of(caplog)
    assert f"pad_token_id {pad} of {checkpoint}" in said
    assert said.endswith(f"texts are padded with token {right.tokens.pad_id} instead")
    batch = model.tokens.batch(model.tokens.encode(SENTENCES))
    assert model.steered.splits
    torch.testing.assert_close(model.steered.logits(batch), right.steered.logits(batch))


def test_pad_id_that_positions_depend_on_is_not_guessed(tmp_path: Path) -> None:
    checkpoint = rewrite(save_tiny("roberta", tmp_path / "model"), pad_token_id=-1)
    with pytest.raises(CheckpointError, match=r"pad_token_id -1 .* correct its config.json"):
        load_model(str(checkpoint), device="cpu")


def test_checkpoint_without_any_token_to_pad_with_is_rejected(tmp_path: Path) -> None:
    checkpoint = rewrite(save_tiny("llama", tmp_path / "model"), pad_token_id=None)
    rewrite(checkpoint, "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(CheckpointError, match="neither a pad token nor an eos token"):
        load_model(str(checkpoint), device="cpu")


def test_labels_numbered_from_1_are_taken_in_order(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(checkpoint, id2label={str(number): label for number, label in enumerate(LABELS, 1)})
    assert load_model(str(checkpoint), device="cpu").identity.labels == LABELS
    assert "counts from 1" in warnings_of(caplog)[0]


def test_labels_with_other_numbers_are_rejected(checkpoint: Path) -> None:
    rewrite(checkpoint, id2label={str(2 * number): label for number, label in enumerate(LABELS)})
    with pytest.raises(CheckpointError, match=r"0 to 3, and has \[0, 2, 4, 6\]"):
        load_model(str(checkpoint), device="cpu")


@pytest.mark.parametrize(
    ("twin", "how"), [("Cafe\u0301", "differ in their Unicode form only"), ("Caf\u00e9", "are the same")]
)
def test_labels_that_look_alike_are_named(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, twin: str, how: str
) -> None:
    rewrite(checkpoint, id2label={"0": "Caf\u00e9", "1": "Tea", "2": "Bar", "3": twin})
    assert load_model(str(checkpoint), device="cpu").identity.labels[3] == twin
    (said,) = warnings_of(caplog)
    assert said == f"labels 0 and 3 of {checkpoint} {how}: 'Caf\u00e9'"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_token_without_an_embedding_is_named_at_load_and_refused_in_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    checkpoint = save_tiny(family, tmp_path / family)
    whole = load_model(str(checkpoint), device="cpu").tokens
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    known = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(checkpoint)
    tokens = load_model(str(checkpoint), device="cpu").tokens
    (said,) = warnings_of(caplog)
    assert "has tokens that the model has no embedding for (1: '<new>')" in said
    assert tokens.encode(SENTENCES) == whole.encode(SENTENCES)
    with pytest.raises(UnknownToken, match=rf"input 1 holds the token '<new>' \({known}\)"):
        tokens.encode(["goal", "goal <new>"])
    assert [bool(text.ids) for text in tokens.encode(["goal", "goal <new>"], keep_empty=True)] == [True, False]


def test_texts_are_cut_where_the_tokenizer_says(checkpoint: Path) -> None:
    text = " ".join(SENTENCES)
    right = load_model(str(checkpoint), device="cpu")
    left = load_model(str(rewrite(checkpoint, "tokenizer_config.json", truncation_side="left")), device="cpu")
    assert (right.facts.truncation_side, left.facts.truncation_side) == ("right", "left")
    whole = left.tokens._tokenizer(text)["input_ids"]
    room = left.tokens.max_tokens - 1
    assert left.tokens.encode([text])[0].ids == (whole[0], *whole[-room:])
    assert right.tokens.encode([text])[0].ids == (*whole[:room], whole[-1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_before_a_prompts_end_are_cut_where_the_tokenizer_says(tiny: Tiny, side: str) -> None:
    tokenizer = copy.copy(tiny("gpt2").tokens._tokenizer)
    tokenizer.truncation_side = side
    text = " ".join(SENTENCES)
    whole = tuple(tokenizer(text)["input_ids"])
    tokens = TextTokenizer(tokenizer, 10, 0, "last", (1, 2))
    assert tokens.encode([text])[0].ids == ((whole[-8:] if side == "left" else whole[:8]) + (1, 2))
    (shown,) = tokens.describe([text])
    parts = [text[token.start : token.stop] for token in shown.tokens[:-2]]
    assert "".join(parts) == (text[-len("".join(parts)) :] if side == "left" else text[: len("".join(parts))])
    assert [token.start for token in shown.tokens[-2:]] == [None, None]
