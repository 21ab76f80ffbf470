"""Cached trunk states give the same answers with fewer passes, in bounded memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from range_store.domain.erasure import Erasure
from tests.workers.engine.running import TEXTS, Running
from workers.engine.trunk_cache import TrunkCache
from workers.models.loading import LoadedModel, load_model
from workers.models.tokens import Encoded, TokenBatch

Tiny = Callable[[str], LoadedModel]


def batch_of(model: LoadedModel, texts: list[str]) -> tuple[TokenBatch, list[Encoded]]:
    encoded = model.tokens.encode(texts)
    return model.tokens.batch(encoded), encoded


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("whole", [False, True])
def test_cached_trunk_equals_the_computed_one(tiny: Tiny, family: str, whole: bool) -> None:
    model = tiny(family)
    for split in range(3):
        cache = TrunkCache(model.steered, model.tokens, 1 << 24)
        batch, encoded = batch_of(model, TEXTS[:6])
        first = cache.trunk(batch, encoded, split, whole=whole)
        some = [TEXTS[n] for n in (4, 1, 1, 5)]
        mixed, all_encoded = batch_of(model, [*some, TEXTS[20]])
        again = cache.trunk(mixed, all_encoded, split, whole=whole)
        assert (cache.hits, cache.misses) == (4, 7)
        for row, n in enumerate((4, 1, 1, 5)):
            width = 1 if split == 2 else len(encoded[n].ids)
            assert torch.equal(again.hidden[row, :width], first.hidden[n, :width])
            if whole:
                assert again.logits is not None
                assert first.logits is not None
                assert torch.equal(again.logits[row], first.logits[n])
        expected = model.steered.trunk(mixed, split, whole=whole)
        width = 1 if split == 2 else len(all_encoded[4].ids)
        torch.testing.assert_close(again.hidden[4, :width], expected.hidden[4, :width], atol=1e-5, rtol=0)


def test_pair_and_text_of_the_same_tokens_are_cached_apart(tiny: Tiny) -> None:
    model = tiny("bert")
    (pair,) = model.tokens.encode([("she won", "the cup")])
    text = Encoded(pair.ids)
    expected = [model.steered.trunk(model.tokens.batch([one]), 0, whole=True) for one in (text, pair)]
    assert (expected[0].hidden - expected[1].hidden).abs().max() > 1e-3
    cache = TrunkCache(model.steered, model.tokens, 1 << 24)
    for _ in range(2):
        for one, own in zip((text, pair), expected, strict=True):
            assert torch.equal(cache.trunk(model.tokens.batch([one]), [one], 0, whole=True).hidden, own.hidden)
        both = cache.trunk(model.tokens.batch([pair, text]), [pair, text], 0, whole=True)
        assert torch.equal(both.hidden, torch.cat([own.hidden for own in reversed(expected)]))
    assert (cache.misses, cache.hits) == (2, 6)


def test_cache_is_bounded_and_evicts_the_least_recently_used(tiny: Tiny) -> None:
    model = tiny("bert")
    one, ids = batch_of(model, TEXTS[:1])
    probe = TrunkCache(model.steered, model.tokens, 1 << 20)
    probe.trunk(one, ids, 0, whole=False)
    limit = 8 * probe.nbytes
    cache = TrunkCache(model.steered, model.tokens, limit)
    texts = list(dict.fromkeys(TEXTS))
    for text in texts:
        cache.trunk(*batch_of(model, [text]), 0, whole=False)
        assert 0 < cache.nbytes <= limit
    assert 0 < len(cache) < len(texts)
    cache.trunk(*batch_of(model, texts[-1:]), 0, whole=False)
    assert cache.hits == 1, "the newest entry is cached"
    cache.trunk(*batch_of(model, texts[:1]), 0, whole=False)
    assert cache.hits == 1, "the oldest entry was evicted"


def test_entry_without_bare_logits_is_no_hit_for_them(tiny: Tiny) -> None:
    model = tiny("bert")
    cache = TrunkCache(model.steered, model.tokens, 1 << 20)
    batch, ids = batch_of(model, TEXTS[:2])
    assert cache.trunk(batch, ids, 1, whole=False).logits is None
    assert torch.equal(cache.trunk(batch, ids, 1, whole=True).logits, model.steered.logits(batch))  # type: ignore[arg-type]
    assert cache.misses == 4
    assert cache.trunk(batch, ids, 1, whole=False).logits is None
    assert cache.hits == 2


def test_trying_settings_on_cached_texts_runs_only_tails(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, bare = start(trunk_cache_bytes=1 << 24), start()
    tries = [
        Erasure(concept="Sports", tau=tau, top_fraction=share, layers=layers)
        for tau in (0.5, 1.0, 2.5)
        for share in (0.3, 1.0)
        for layers in ((-1,), (0, 2))
    ]
    expected = [bare.ask(TEXTS[:3], [erasure]) for erasure in tries]
    cached.ask(TEXTS[:3], [tries[0]], compare=True)
    cached.ask(TEXTS[:3], [tries[1]], compare=True)
    model: Any = cached.model.steered
    monkeypatch.setattr(model, "trunk", lambda *args, **options: pytest.fail("a trunk was run"))
    for erasure, known in zip(tries, expected, strict=True):
        for one, other in zip(cached.ask(TEXTS[:3], [erasure]).texts, known.texts, strict=True):
            assert np.abs(one.logits - other.logits).max() < 1e-4
            assert one.masked_neurons == other.masked_neurons
    metrics = cached.engine.metrics
    assert metrics.trunk_cache_hits._value.get() == 3 * len(tries)
    assert metrics.trunk_cache_misses._value.get() == 6
    assert metrics.trunk_cache_bytes._value.get() > 0


def test_cached_states_have_the_type_of_their_model(tiny: Tiny) -> None:
    full = tiny("bert")
    half = load_model(full.source, device="cpu", dtype="bfloat16")
    for model, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        cache = TrunkCache(model.steered, model.tokens, 1 << 20)
        batch, ids = batch_of(model, TEXTS[:2])
        cache.trunk(batch, ids, 1, whole=False)
        assert cache.trunk(batch, ids, 1, whole=False).hidden.dtype == dtype
