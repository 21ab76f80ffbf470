"""Pairs of texts answer as in transformers, for every family, alone and among single texts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.workers.checkpoints import SENTENCES, save_label_token, save_tiny
from tests.workers.masking import ZeroBand
from workers.models.errors import EmptyText, PairUnsupported, TextTooLong
from workers.models.families import FAMILIES
from workers.models.loading import LoadedModel, load_model
from workers.models.texts import TextOrPair, characters
from workers.models.tokens import Encoded

Tiny = Callable[[str], LoadedModel]
families = pytest.mark.parametrize("family", sorted(FAMILIES))
LONG = " ".join(SENTENCES)
PAIRS = (
    ("She won.", "The cup is hers."),
    (SENTENCES[0], SENTENCES[1]),
    (SENTENCES[1], SENTENCES[0]),
    ("", "Only a second text."),
    ("Only a first text.", ""),
    ("\ud800 lone", "half a pair \udc00"),
    (LONG, "Short."),
    ("Short.", LONG),
    (LONG, LONG),
)
MIXED: tuple[TextOrPair, ...] = ("Short.", *PAIRS[:5], SENTENCES[0], *PAIRS[5:], LONG)


def own_tokens(model: LoadedModel, text: TextOrPair) -> dict[str, torch.Tensor]:
    """Tokens from the tokenizer of transformers, which rejects lone surrogates.

    It is given lists: of two strings it would drop an empty second one.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.source)
    parts = (text,) if isinstance(text, str) else text
    clean = [[part.replace("\ud800", "?").replace("\udc00", "?")] for part in parts]
    return dict(tokenizer(*clean, truncation=True, return_tensors="pt"))


def own_logits(model: LoadedModel, texts: tuple[TextOrPair, ...], layer: int | None = None) -> torch.Tensor:
    """Forward pass of transformers for each text by itself; the band of `ZeroBand` becomes 0 after block `layer`."""
    own = AutoModelForSequenceClassification.from_pretrained(model.source).eval()
    own.config.pad_token_id = model.tokens.pad_id
    band = ZeroBand([])

    def zero(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.where((hidden >= band.low) & (hidden <= band.high), torch.zeros_like(hidden), hidden)

    if layer is not None:
        own.get_submodule(f"{FAMILIES[model.identity.family].blocks}.{layer}").register_forward_hook(zero)
    with torch.inference_mode():
        return torch.cat([own(**own_tokens(model, text)).logits for text in texts])


@families
def test_tokens_of_a_pair_equal_those_of_transformers(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    for text, encoded in zip(MIXED, model.tokens.encode(MIXED), strict=True):
        expected = own_tokens(model, text)
        assert list(encoded.ids) == expected["input_ids"][0].tolist()
        typed = not isinstance(text, str) and family in ("bert", "electra")
        assert encoded.type_ids == (tuple(expected["token_type_ids"][0].tolist()) if typed else None)
        assert encoded.truncated == (characters(text) >= len(LONG))
        assert len(encoded.ids) <= model.tokens.max_tokens
    with pytest.raises(TextTooLong, match="input 2"):
        model.tokens.encode(["a", ("a", "b"), ("a", LONG), LONG], truncate=False)


@families
def test_pairs_among_texts_answer_as_in_transformers(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    packed = model.tokens.batch(model.tokens.encode(MIXED))
    padded = replace(packed, packing=None)
    expected = own_logits(model, MIXED)
    for batch in (packed, padded):
        torch.testing.assert_close(model.steered.logits(batch), expected, atol=2e-5, rtol=0)
    rows = torch.arange(len(MIXED))
    for layer in range(model.identity.n_layers):
        erased, masking = own_logits(model, MIXED, layer), ZeroBand([layer])
        assert (erased - expected).abs().max() > 1e-3, "the masking has no effect"
        torch.testing.assert_close(model.steered.hooked(padded, masking), erased, atol=2e-5, rtol=0)
        for batch in (packed, padded):
            for whole in (True, False):
                trunk = model.steered.trunk(batch, layer, whole=whole)
                actual = model.steered.steer(batch, trunk, rows, masking)
                torch.testing.assert_close(actual, erased, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_token_types_change_the_answer(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    batch = model.tokens.batch(model.tokens.encode([PAIRS[1]]))
    assert batch.type_ids is not None
    untyped = model.tokens.batch([Encoded(tuple(row)) for row in batch.ids.tolist()])
    assert (model.steered.logits(batch) - model.steered.logits(untyped)).abs().max() > 1e-3


def test_masks_inside_blocks_apply_to_pairs(tiny: Tiny) -> None:
    """With masks inside a block every variant is a full pass of its rows."""
    model = tiny("bert")
    batch = model.tokens.batch(model.tokens.encode(MIXED))
    masking = ZeroBand([1])
    masking.site = "mlp_output"
    rows = torch.tensor([3, 3, 0, 7, 1])
    trunk = model.steered.trunk(batch, 1, whole=False)
    expected = [model.steered.hooked(model.tokens.batch(model.tokens.encode([MIXED[row]])), masking) for row in rows]
    torch.testing.assert_close(model.steered.steer(batch, trunk, rows, masking), torch.cat(expected), atol=2e-5, rtol=0)


@families
def test_single_texts_are_passed_without_token_types(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    called: list[Any] = []
    handle = model.steered._sited.register_forward_pre_hook(
        lambda module, args, given: called.append(given), with_kwargs=True
    )
    for texts in (MIXED[:1], (SENTENCES[0], "Short.")):
        batch = model.tokens.batch(model.tokens.encode(texts))
        assert batch.type_ids is None
        model.steered.logits(batch)
    handle.remove()
    assert called
    assert not any("token_type_ids" in given for given in called)


def test_model_with_one_token_type_gets_no_type_ids(tmp_path: Path) -> None:
    """Tokenizers of RoBERTa may give type ids for which its model has no embedding."""
    path = save_tiny("roberta", tmp_path, type_vocab_size=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(path)
    model = load_model(str(path), device="cpu")
    batch = model.tokens.batch(model.tokens.encode(PAIRS))
    assert batch.type_ids is None
    assert model.steered.logits(batch).isfinite().all()


def test_pair_without_tokens_is_rejected(tiny: Tiny) -> None:
    assert len(tiny("bert").tokens.encode([("", "")])[0].ids) == 3
    with pytest.raises(EmptyText, match="input 1"):
        tiny("llama").tokens.encode([("", "a"), ("", "")])


def test_label_token_model_rejects_pairs(tmp_path: Path) -> None:
    model = load_model(str(save_label_token("gpt2", tmp_path)), device="cpu")
    with pytest.raises(PairUnsupported, match="input 1 is a pair of texts, and a label-token or few-shot classifier"):
        model.tokens.encode(["one", ("two", "three")])
