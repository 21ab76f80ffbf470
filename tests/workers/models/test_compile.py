"""Compiled blocks give what the bare blocks give, and where they cannot be had the bare ones stay."""

import logging
from pathlib import Path

import pytest
import torch

from tests.workers.checkpoints import SENTENCES, save_tiny
from tests.workers.masking import ZeroBand
from workers.models.errors import CheckpointError
from workers.models.loading import load_model


def test_compiled_blocks_answer_as_bare_ones_and_still_obey_masks(tmp_path: Path) -> None:
    path = str(save_tiny("bert", tmp_path))
    bare, compiled = load_model(path, device="cpu"), load_model(path, device="cpu", compiled=True)
    site = compiled.steered._sited.get_submodule("bert.encoder.layer.0.block")
    assert isinstance(site, torch._dynamo.OptimizedModule), "the blocks are compiled indeed"
    for texts in (SENTENCES[:1], SENTENCES, ("Short.", *SENTENCES, SENTENCES[:2])):
        batch = bare.tokens.batch(bare.tokens.encode(texts))
        torch.testing.assert_close(compiled.steered.logits(batch), bare.steered.logits(batch), atol=1e-5, rtol=0)
        rows = torch.arange(len(texts))
        for layer in range(3):
            masking = ZeroBand([layer])
            expected = bare.steered.hooked(batch, masking)
            torch.testing.assert_close(compiled.steered.hooked(batch, masking), expected, atol=1e-5, rtol=0)
            trunk = compiled.steered.trunk(batch, layer, whole=False)
            torch.testing.assert_close(compiled.steered.steer(batch, trunk, rows, masking), expected, atol=1e-5, rtol=0)


def test_blocks_that_cannot_be_compiled_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*args: object, **options: object) -> torch.nn.Module:
        class Fails(torch.nn.Module):
            def forward(self, *args: object, **options: object) -> None:
                raise RuntimeError("no working C++ compiler")

        return Fails()

    path = str(save_tiny("bert", tmp_path))
    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.WARNING):
        model = load_model(path, device="cpu", compiled=True)
    assert "left as they are" in caplog.text
    batch = model.tokens.pad([text.ids for text in model.tokens.encode(SENTENCES)])
    assert torch.equal(model.steered.logits(batch), load_model(path, device="cpu").steered.logits(batch))


@pytest.mark.parametrize("other", [{"plain": True}, {"template": "ag_news"}])
def test_what_excludes_each_other_is_told(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="--compile does not go with --"):
        load_model(str(tmp_path), compiled=True, **other)  # type: ignore[arg-type]
