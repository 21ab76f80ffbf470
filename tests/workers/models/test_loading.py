"""Loading takes safetensors with a trained head, gives a fingerprint of config and weights, and has clear errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from tests.workers.checkpoints import LABELS, SENTENCES, save_tiny
from workers.models.errors import CheckpointError, EmptyText, TextTooLong, UnsupportedModel
from workers.models.loading import LoadedModel, load_model

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


def test_pickled_weights_are_rejected_unless_allowed(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    expected = load_model(str(checkpoint), device="cpu")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="allow-pickle"):
        load_model(str(checkpoint), device="cpu")
    pickled = load_model(str(checkpoint), device="cpu", allow_pickle=True)
    batch = pickled.tokens.pad([text.ids for text in pickled.tokens.encode(SENTENCES)])
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
    batch = model.tokens.pad([text.ids for text in model.tokens.encode(SENTENCES)])
    assert model.steered.logits(batch).dtype == torch.bfloat16


def test_long_texts_are_truncated_to_the_model_or_rejected(tiny: Tiny) -> None:
    for family in ("bert", "roberta", "gpt2"):
        model = tiny(family)
        long = "goal " * 500
        cut, whole = model.tokens.encode([long, "goal"])
        assert cut.truncated
        assert len(cut.ids) == model.tokens.max_tokens
        assert not whole.truncated
        assert torch.isfinite(model.steered.logits(model.tokens.pad([cut.ids, whole.ids]))).all()
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
    batch = model.tokens.pad([(*ids, eos), ids[:3]])
    assert batch.read.tolist() == [len(ids) - 1, 2]
    last = model.identity.n_layers - 1
    assert batch.mask[0].all()
    _, states = model.steered.record(batch, [last])
    with torch.inference_mode():
        head = model.steered.model.score(model.steered.model.transformer.ln_f(states[last]))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(head, model.steered.logits(batch))
