"""Compiled blocks answer as the bare blocks do, and bare blocks stay where compiling fails."""

import logging
from pathlib import Path

import pytest
import torch

from tests.workers.checkpoints import SENTENCES, save_tiny
from tests.workers.masking import ZeroBand
from workers.models.errors import CheckpointError
from workers.models.loading import LoadedModel, load_model
from workers.models.texts import TextOrPair


def assert_same_answers(compiled: LoadedModel, bare: LoadedModel, texts: tuple[TextOrPair, ...]) -> None:
    """Compare bare logits, hooked full passes and tails at every layer."""
    site = compiled.steered._sited.get_submodule("bert.encoder.layer.0.block")
    assert isinstance(site, torch._dynamo.OptimizedModule), "the blocks are not compiled"
    batch = bare.tokens.batch(bare.tokens.encode(texts))
    unmasked = bare.steered.logits(batch)
    torch.testing.assert_close(compiled.steered.logits(batch), unmasked, atol=1e-5, rtol=0)
    for layer in range(bare.identity.n_layers):
        masking = ZeroBand([layer])
        expected = bare.steered.hooked(batch, masking)
        assert (expected - unmasked).abs().max() > 1e-3, "the masking has no effect"
        torch.testing.assert_close(compiled.steered.hooked(batch, masking), expected, atol=1e-5, rtol=0)
        trunk = compiled.steered.trunk(batch, layer, whole=False)
        tail = compiled.steered.steer(batch, trunk, torch.arange(len(texts)), masking)
        torch.testing.assert_close(tail, expected, atol=1e-5, rtol=0)


def test_traced_blocks_answer_as_bare_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks pass through `torch.compile` with its eager backend, which generates no code and so is quick."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda block, **options: compiler(block, backend="eager", dynamic=True))
    path = str(save_tiny("bert", tmp_path, n_layers=2))
    compiled = load_model(path, device="cpu", compiled=True)
    assert_same_answers(compiled, load_model(path, device="cpu"), SENTENCES[:3])


@pytest.mark.full
def test_compiled_blocks_answer_as_bare_ones(tmp_path: Path) -> None:
    path = str(save_tiny("bert", tmp_path))
    compiled, bare = load_model(path, device="cpu", compiled=True), load_model(path, device="cpu")
    for texts in (SENTENCES[:1], SENTENCES, ("Short.", *SENTENCES, SENTENCES[:2])):
        assert_same_answers(compiled, bare, texts)


def test_blocks_stay_bare_when_compiling_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(torch.nn.Module):
        def forward(self, *args: object, **options: object) -> None:
            raise RuntimeError("no working C++ compiler")

    path = str(save_tiny("bert", tmp_path))
    monkeypatch.setattr(torch, "compile", lambda block, **options: Failing())
    with caplog.at_level(logging.WARNING):
        model = load_model(path, device="cpu", compiled=True)
    assert "left as they are" in caplog.text
    batch = model.tokens.batch(model.tokens.encode(SENTENCES))
    assert torch.equal(model.steered.logits(batch), load_model(path, device="cpu").steered.logits(batch))


@pytest.mark.parametrize("other", [{"plain": True}, {"template": "ag_news"}])
def test_compile_rejects_conflicting_options(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="--compile cannot be combined with --"):
        load_model(str(tmp_path), compiled=True, **other)  # type: ignore[arg-type]
