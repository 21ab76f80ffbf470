"""A trunk with a tail equals a hooked full pass, and bare answers equal the bare model bit for bit.

The batches here are padded, as in transformers; packed trunks are tested in `test_packing.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers.checkpoints import SENTENCES, save_tiny
from tests.workers.masking import Alike, ZeroBand
from workers.models.families import FAMILIES
from workers.models.loading import LoadedModel, load_model
from workers.models.steerable import ZeroAll
from workers.models.steered import SteeredModel
from workers.models.tokens import TokenBatch

Tiny = Callable[[str], LoadedModel]
families = pytest.mark.parametrize("family", sorted(FAMILIES))
TEXTS = ("Short.", *SENTENCES, "One more, of middling length, about rain.")


def padded(model: LoadedModel) -> TokenBatch:
    batch = model.tokens.batch(model.tokens.encode(TEXTS))
    assert not batch.mask.all(), "the batch has no padding"
    return replace(batch, packing=None)


@families
def test_every_family_can_be_split(tiny: Tiny, family: str) -> None:
    assert tiny(family).steered.splits


@families
def test_tail_equals_hooked_full_pass_at_every_layer(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = padded(model)
    rows = torch.tensor([3, 0, 0, 9, 5, 1, 2, 4, 6, 7, 8])
    bare = model.steered.logits(batch)
    for layer in range(model.identity.n_layers):
        masking = ZeroBand([layer])
        expected = model.steered.hooked(batch, masking)[rows]
        actual = model.steered.steer(batch, model.steered.trunk(batch, layer, whole=False), rows, masking)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        assert (expected - bare[rows]).abs().max() > 1e-3, "the masking has no effect"


@families
def test_tail_masks_several_layers(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = padded(model)
    rows = torch.arange(len(TEXTS))
    for layers in ([0, 1], [1, 2], [0, 2], [0, 1, 2]):
        masking = ZeroBand(layers)
        expected = model.steered.hooked(batch, masking)
        actual = model.steered.steer(batch, model.steered.trunk(batch, layers[0], whole=False), rows, masking)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@families
def test_whole_trunk_gives_the_bare_logits_bit_for_bit(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = padded(model)
    with torch.inference_mode():
        reference = model.steered.model(
            input_ids=batch.ids, attention_mask=batch.mask.long(), **model.steered.family.call
        ).logits
    assert torch.equal(model.steered.logits(batch), reference)
    for layer in range(model.identity.n_layers):
        trunk = model.steered.trunk(batch, layer, whole=True)
        assert trunk.logits is not None
        assert torch.equal(trunk.logits, reference)
        assert torch.equal(trunk.hidden, model.steered.trunk(batch, layer, whole=False).hidden)


@families
def test_recorded_states_are_block_outputs_at_the_read_position(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = padded(model)
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, args, output: outputs.__setitem__(layer, output)

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(model.steered.blocks)]
    model.steered.logits(batch)
    for handle in handles:
        handle.remove()
    lengths = batch.mask.sum(dim=1)
    read = lengths * 0 if FAMILIES[family].reads == "first" else lengths - 1
    logits, states = model.steered.record(batch, range(model.identity.n_layers))
    assert torch.equal(logits, model.steered.logits(batch))
    for layer, state in states.items():
        assert torch.equal(state, outputs[layer][torch.arange(len(TEXTS)), read])


@families
def test_head_reads_the_read_position_only(tiny: Tiny, family: str) -> None:
    """At the last block, changing the state at the read position changes the logits, and no other position does."""
    model = tiny(family)
    batch = padded(model)
    last = model.identity.n_layers - 1
    bare = model.steered.logits(batch)

    class Shift(Alike):
        layers = (last,)

        def __init__(self, at_read: bool) -> None:
            self.at_read = at_read

        def __call__(self, layer: int, hidden: torch.Tensor, now: TokenBatch) -> torch.Tensor:
            is_read = torch.zeros_like(now.mask)
            is_read[torch.arange(len(hidden)), now.read] = True
            ramp = torch.arange(hidden.shape[-1], dtype=hidden.dtype)
            return hidden + ramp * (is_read == self.at_read).unsqueeze(-1)

    assert torch.equal(model.steered.hooked(batch, Shift(at_read=False)), bare)
    assert (model.steered.hooked(batch, Shift(at_read=True)) - bare).abs().amax(dim=1).min() > 1e-4


@families
def test_padding_changes_answers_by_rounding_only(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = padded(model)
    for layer in range(model.identity.n_layers):
        rows = torch.arange(len(TEXTS))
        together = model.steered.steer(batch, model.steered.trunk(batch, layer, whole=False), rows, ZeroBand([layer]))
        for row, text in enumerate(model.tokens.encode(TEXTS)):
            alone = model.tokens.batch([text])
            logits = model.steered.steer(
                alone, model.steered.trunk(alone, layer, whole=False), torch.tensor([0]), ZeroBand([layer])
            )
            torch.testing.assert_close(logits[0], together[row], atol=2e-4, rtol=2e-4)


def test_qwen2_keeps_its_layer_types_in_the_tail(tmp_path: Path) -> None:
    """A sliding-window block in the tail must get the sliding mask."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = load_model(
        str(save_tiny("qwen2", tmp_path, layer_types=types, use_sliding_window=True, sliding_window=4)), device="cpu"
    )
    assert model.steered.splits
    assert not model.steered.packs, "attention over a window is not packed"
    batch = padded(model)
    rows = torch.arange(len(TEXTS))
    for layer in range(3):
        masking = ZeroBand([layer])
        actual = model.steered.steer(batch, model.steered.trunk(batch, layer, whole=False), rows, masking)
        torch.testing.assert_close(actual, model.steered.hooked(batch, masking), atol=1e-5, rtol=0)


class _TupleBlock(nn.Module):
    """A block that returns a tuple, as blocks of older models do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (self.block(*args, **kwargs),)


class _OldEncoder(nn.Module):
    """An encoder that unpacks tuples from its blocks."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_TupleBlock(block) for block in encoder.layer)  # type: ignore[union-attr]

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        for block in self.layer:
            hidden = block(hidden, attention_mask)[0]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


def test_model_that_cannot_be_split_answers_the_same_by_full_passes(tmp_path: Path) -> None:
    path = str(save_tiny("bert", tmp_path))
    fits, misfit = load_model(path, device="cpu"), load_model(path, device="cpu")
    bert = misfit.steered.model
    bert.bert.encoder = _OldEncoder(bert.bert.encoder)  # type: ignore[union-attr, operator]
    old = SteeredModel(bert, misfit.steered.family)
    batch = padded(fits)
    old.check(batch)
    assert not old.splits
    rows = torch.arange(len(TEXTS))
    for layer in range(3):
        masking = ZeroBand([layer])
        expected = fits.steered.hooked(batch, masking)
        trunk = old.trunk(batch, layer, whole=True)
        torch.testing.assert_close(trunk.logits, fits.steered.logits(batch), atol=1e-5, rtol=0)
        torch.testing.assert_close(old.steer(batch, trunk, rows, masking), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(old.record(batch, [1])[1][1], fits.steered.record(batch, [1])[1][1])


def test_steering_does_not_change_the_bare_model(tiny: Tiny) -> None:
    model = tiny("gpt2")
    names = set(model.steered.model.state_dict())
    batch = padded(model)
    before = model.steered.logits(batch)
    rows = torch.arange(len(TEXTS))
    model.steered.steer(batch, model.steered.trunk(batch, 0, whole=True), rows, ZeroBand([0, 2]))
    assert torch.equal(model.steered.logits(batch), before)
    assert set(model.steered.model.state_dict()) == names


@families
def test_logits_of_an_empty_state_are_what_erasing_every_neuron_leaves_of_any_text(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = padded(model)
    assert len(model.empty_logits) == model.identity.n_layers
    for layer, left in enumerate(model.empty_logits):
        emptied = model.steered.hooked(batch, ZeroAll(layer))
        torch.testing.assert_close(emptied, torch.tensor(left).expand_as(emptied), atol=1e-5, rtol=0)
