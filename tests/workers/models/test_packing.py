"""Packed texts answer as padded texts do."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.workers.checkpoints import SENTENCES, save_tiny
from tests.workers.masking import ZeroBand
from workers.models import packing
from workers.models.families import FAMILIES
from workers.models.loading import LoadedModel, load_model
from workers.models.packing import Packing
from workers.models.tokens import TokenBatch

Tiny = Callable[[str], LoadedModel]
families = pytest.mark.parametrize("family", sorted(FAMILIES))
MIXED = ("Short.", *SENTENCES, "One more, of middling length, about rain.")
ALIKE = (SENTENCES[0], SENTENCES[0], SENTENCES[0])


def batch_of(model: LoadedModel, texts: tuple[str, ...]) -> TokenBatch:
    return model.tokens.batch(model.tokens.encode(texts))


@families
@pytest.mark.parametrize("texts", [MIXED, ALIKE, MIXED[:1]], ids=["mixed", "one length", "single"])
def test_packed_logits_and_states_equal_those_of_padded_texts(tiny: Tiny, family: str, texts: tuple[str, ...]) -> None:
    model = tiny(family)
    assert model.steered.packs
    batch = batch_of(model, texts)
    plain = replace(batch, packing=None)
    torch.testing.assert_close(model.steered.logits(batch), model.steered.logits(plain), atol=1e-5, rtol=0)
    layers = range(model.identity.n_layers)
    for position in ("read", "mean"):
        logits, states = model.steered.record(batch, layers, position=position)  # type: ignore[arg-type]
        expected_logits, expected = model.steered.record(plain, layers, position=position)  # type: ignore[arg-type]
        torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
        for layer in layers:
            torch.testing.assert_close(states[layer], expected[layer], atol=2e-5, rtol=0)


@families
def test_packed_trunks_and_their_tails_equal_hooked_full_passes(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = batch_of(model, MIXED)
    rows = torch.tensor([3, 0, 0, 9, 5, 1, 2, 4, 6, 7, 8])
    bare = model.steered.logits(batch)
    for layers in ([0], [1], [2], [0, 2], [1, 2]):
        masking = ZeroBand(layers)
        expected = model.steered.hooked(batch, masking)[rows]
        for whole in (False, True):
            trunk = model.steered.trunk(batch, layers[0], whole=whole)
            actual = model.steered.steer(batch, trunk, rows, masking)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
            if whole:
                assert trunk.logits is not None
                assert torch.equal(trunk.logits, bare), "the baseline is not the bare answer"


@families
def test_non_finite_text_does_not_affect_others(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the states of one text must not reach the texts packed beside it."""
    model = tiny(family)
    batch = batch_of(model, MIXED)
    assert batch.packing is not None
    before = model.steered.logits(batch)
    broken = int(batch.packing.reads[4])
    first = model.steered.blocks[0]

    def spoil(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        spoilt = output.clone()
        if spoilt.shape[:2] == batch.packing.ids.shape:  # type: ignore[union-attr]
            spoilt[0, broken] = torch.nan
        return spoilt

    handle = first.register_forward_hook(spoil)
    after = model.steered.logits(batch)
    handle.remove()
    assert after[4].isnan().all()
    others = [row for row in range(len(MIXED)) if row != 4]
    assert torch.equal(after[others], before[others])


def test_plain_model_equals_transformers_bit_for_bit(tmp_path: Path) -> None:
    path = str(save_tiny("bert", tmp_path))
    model = load_model(path, device="cpu", plain=True)
    assert not model.steered.packs
    batch = batch_of(model, MIXED)
    own = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.inference_mode():
        expected = own(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    assert torch.equal(model.steered.logits(batch), expected)
    packed = load_model(path, device="cpu")
    torch.testing.assert_close(packed.steered.logits(batch), expected, atol=1e-5, rtol=0)


def test_packing_locates_every_token() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 0, 0], [9, 10, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    packing = Packing.of(ids, mask, torch.tensor([2, 0, 0]))
    assert packing.ids.tolist() == [[5, 6, 7, 8, 9, 10, 0, 0]], "the length is not rounded up"
    assert packing.positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
    assert packing.filling == 2
    assert packing.reads.tolist() == [2, 3, 4]
    assert [group.places.tolist() for group in packing.groups] == [[0, 1, 2, 3, 6, 7]], (
        "texts of similar length are not one group"
    )
    states = packing.ids.unsqueeze(-1)
    assert torch.equal(packing.padded(states).squeeze(-1)[mask], ids[mask])


def test_texts_of_similar_length_are_one_attention_group() -> None:
    lengths = torch.tensor([5, 9, 40, 50, 50, 6])
    mask = torch.arange(50) < lengths[:, None]
    packing = Packing.of(mask.long(), mask, lengths - 1)
    assert [(group.rows.start, group.rows.stop) for group in packing.groups] == [(0, 2), (2, 5), (5, 6)]
    assert sum(len(group.places) for group in packing.groups) == lengths.sum()
    assert [group.tokens.start for group in packing.groups] == [0, 14, 154]
    assert [group.padded for group in packing.groups] == [True, True, False]


@families
def test_kernel_for_varying_lengths_equals_attention_text_by_text(
    tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs CUDA; a plain implementation in its place checks the arguments it gets."""
    calls = []

    def by_text(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest: int,
        longest_key: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert torch.equal(starts, key_starts)
        assert starts.dtype is torch.int32
        assert (int(starts[0]), int(starts[-1])) == (0, len(query)), "a token belongs to no text"
        assert longest == longest_key == int(starts.diff().max())
        assert all(states.is_contiguous() for states in (query, key, value))
        calls.append(len(query))
        given = torch.empty_like(query)
        for start, end in itertools.pairwise(starts.tolist()):
            own = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
            given[start:end] = torch.nn.functional.scaled_dot_product_attention(
                *own, is_causal=window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        return given

    model = tiny(family)
    for texts in (MIXED, ALIKE):
        batch = batch_of(model, texts)
        expected = model.steered.trunk(batch, 2, whole=True)
        with monkeypatch.context() as patch:
            patch.setattr(packing, "takes_varying_lengths", lambda states: True)
            patch.setattr(packing, "varlen_attn", by_text)
            trunk = model.steered.trunk(batch, 2, whole=True)
        torch.testing.assert_close(trunk.hidden, expected.hidden, atol=2e-5, rtol=0)
        torch.testing.assert_close(trunk.logits, expected.logits, atol=1e-5, rtol=0)
    assert len(calls) == 2 * 2, "two blocks of a pass; the last one attends at the read position only"
