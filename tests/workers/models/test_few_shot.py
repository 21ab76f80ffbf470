"""Few-shot classifiers equal plain passes of the raw transformers model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model

from range_store.domain.erasure import Positions, Site
from range_store.domain.plan import LayerEdits, Plan
from tests.workers.masking import edits_of
from workers.models.families import FAMILIES
from workers.models.few_shot.model import NOT_DECODED, FewShotModel
from workers.models.tokens import TokenBatch

VOCABULARY, HIDDEN, LAYERS = 50, 32, 3
PREFIX = (1, 7, 9, 11, 4, 3)
LABELS = ((20,), (21, 22), (20, 23, 24), (25, 21))
TEXTS = ((5, 6, 8), (12, 13, 14, 15, 16, 17, 2), (30,), (31, 33, 35, 37))
CAUSAL = sorted(name for name, family in FAMILIES.items() if family.causal)
families = pytest.mark.parametrize("family", CAUSAL)


def language_model(family: str, **settings: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        sizes |= {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
    else:
        sizes |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **settings}))
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return lm.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lms() -> dict[str, Any]:
    return {family: language_model(family) for family in CAUSAL}


def few_shot(lm: Any, family: str, **settings: Any) -> FewShotModel:
    return FewShotModel(lm, FAMILIES[family], PREFIX, LABELS, **settings)


def padded(texts: Sequence[Sequence[int]] = TEXTS) -> TokenBatch:
    width = max(map(len, texts))
    ids = torch.zeros((len(texts), width), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) for text in texts])
    return TokenBatch(ids, torch.arange(width) < lengths[:, None], lengths - 1)


def plan(seed: int, layers: Sequence[int], site: Site = "block_output") -> Plan:
    rng = np.random.default_rng(seed)
    edits = {}
    for layer in layers:
        low = rng.normal(size=(1, HIDDEN)).astype(np.float32) * 3
        high = low + rng.uniform(0, 6, size=low.shape).astype(np.float32)
        nothing = np.zeros_like(low)
        edits[layer] = LayerEdits(low, high, rng.random(low.shape) < 0.1, nothing, nothing)
    return Plan((), edits, f"plan-{seed}-{layers}", site)


def reference(
    lm: Any, family: str, text: Sequence[int], of: Plan | None, positions: Positions = "all"
) -> tuple[list[float], Tensor]:
    """Scores of one text, one pass per label, masked by hooks written without the code under test; and its states."""
    scores, states = [], []
    prompt = [*PREFIX, *text]
    for label in LABELS:
        ids = torch.tensor([[*prompt, *label]])
        read_from = len(prompt) - 1
        handles = []
        outputs: dict[int, Tensor] = {}
        for layer, block in enumerate(lm.get_submodule(FAMILIES[family].blocks)):

            def hook(
                module: Any,
                args: Any,
                output: Tensor,
                layer: int = layer,
                first: int = read_from,
                outputs: dict[int, Tensor] = outputs,
            ) -> Tensor:
                outputs[layer] = output
                if of is None or layer not in of.edits:
                    return output
                mask = of.edits[layer]
                low, high, always = (torch.from_numpy(part[0]) for part in (mask.low, mask.high, mask.always))
                hit = ((output >= low) & (output <= high)) | always
                may = torch.arange(output.shape[1]) >= (0 if positions == "all" else first)
                return torch.where(hit & may[None, :, None], 0.0, output)

            place = block if of is None or of.site == "block_output" else block.get_submodule("mlp")
            handles.append(place.register_forward_hook(hook))
        log = lm(ids).logits[0].log_softmax(dim=-1)
        for handle in handles:
            handle.remove()
        scores.append(sum(float(log[len(prompt) - 1 + i, token]) for i, token in enumerate(label)))
        states.append(torch.stack([outputs[layer][0, read_from] for layer in range(LAYERS)]))
    return scores, states[0]


def close(actual: Tensor, expected: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [0, LAYERS - 1])
def test_logits_over_the_vocabulary_are_computed_a_few_texts_at_a_time(
    lms: dict[str, Any], monkeypatch: pytest.MonkeyPatch, split: int
) -> None:
    model = few_shot(lms["gpt2"], "gpt2")
    batch, of = padded(), plan(1, (split,))
    rows = torch.arange(len(TEXTS)).repeat(3)
    table = edits_of([of], len(rows))

    def both() -> tuple[Tensor, Tensor]:
        return model.logits(batch), model.steer(batch, model.trunk(batch, split, whole=False), rows, table)

    expected = both()
    head = model.model.get_output_embeddings()
    read = 1 + sum(len(label) - 1 for label in LABELS)
    monkeypatch.setattr("workers.models.few_shot.model.LOGITS_AT_ONCE", 2 * read * head.weight.shape[0])
    sizes: list[int] = []
    hook = head.register_forward_hook(lambda _module, _args, logits: sizes.append(logits.shape[0]))
    found = both()
    hook.remove()
    assert max(sizes) <= 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_tail_is_as_wide_as_what_runs_in_it(lms: dict[str, Any]) -> None:
    batch, width = padded(), max(map(len, TEXTS))
    model, last = few_shot(lms["gpt2"], "gpt2"), LAYERS - 1
    assert model.tail_width(batch, last) == 1 + sum(len(label) - 1 for label in LABELS)
    assert model.tail_width(batch, 0) == width
    greedy = few_shot(lms["gpt2"], "gpt2", scoring="greedy", decode=str, label_texts=("a", "b", "c"))
    assert greedy.tail_width(batch, last) == width
    model.splits = False
    assert model.tail_width(batch, last) == width


@families
def test_scores_are_log_probabilities_of_the_label_strings(lms: dict[str, Any], family: str) -> None:
    model = few_shot(lms[family], family)
    batch = padded()
    model.check(batch)
    assert model.splits
    expected = [reference(lms[family], family, text, None)[0] for text in TEXTS]
    close(model.logits(batch), expected)
    alone = [model.logits(padded([text]))[0] for text in TEXTS]
    torch.testing.assert_close(torch.stack(alone), model.logits(batch), atol=2e-5, rtol=1e-5)


@families
@pytest.mark.parametrize("positions", ["all", "read"])
def test_steering_with_two_plans_in_a_batch_equals_hooks(
    lms: dict[str, Any], family: str, positions: Positions
) -> None:
    lm = lms[family]
    model = few_shot(lm, family)
    batch = padded()
    rows = torch.tensor([2, 0, 0, 1, 3])
    slots = [0, 0, 1, 1, 0]
    bare = model.logits(batch)
    for layers in ((0,), (1,), (2,), (0, 2), (1, 2)):
        plans = [plan(seed, layers) for seed in (1, 2)]
        table = edits_of([plans[slot] for slot in slots], positions=positions)
        expected = [
            reference(lm, family, TEXTS[int(row)], plans[slot], positions)[0]
            for row, slot in zip(rows, slots, strict=True)
        ]
        for trunk in (model.trunk(batch, layers[0], whole=False), model.trunk(batch, layers[0], whole=True)):
            close(model.steer(batch, trunk, rows, table), expected)
        counted = table.masked
        plain = edits_of([plans[slot] for slot in slots], positions=positions)
        close(model.hooked(batch.rows(rows), plain), expected)
        assert torch.equal(plain.masked, counted), "a text is counted more than once"
        assert trunk.logits is not None
        assert torch.equal(trunk.logits, bare)
        assert (torch.tensor(expected) - bare[rows]).abs().max() > 1e-2, "the masking has no effect"


@families
def test_prefix_cache_keeps_its_bound(lms: dict[str, Any], family: str) -> None:
    lm = lms[family]
    batch = padded()
    rows = torch.arange(len(TEXTS))
    plans = [plan(seed, (0,)) for seed in range(4)]
    expected = [[reference(lm, family, text, each)[0] for text in TEXTS] for each in plans]
    one = few_shot(lm, family)
    trunk = one.trunk(batch, 0, whole=False)
    one.steer(batch, trunk, rows, edits_of(plans[:1], len(TEXTS)))
    size = one.prefix_cache_bytes
    assert size > 0
    for bound in (0, size, 2 * size, 100 * size):
        model = few_shot(lm, family, prefix_bytes=bound)
        for number in (0, 1, 0, 2, 3, 1, 0, 0):
            table = edits_of([plans[number]], len(TEXTS))
            close(model.steer(batch, trunk, rows, table), expected[number])
            assert model.prefix_cache_bytes <= bound


@families
def test_cached_prefix_of_a_plan_is_not_run_again(lms: dict[str, Any], family: str) -> None:
    model = few_shot(lms[family], family)
    batch = padded()
    rows = torch.arange(len(TEXTS))
    widths: list[int] = []
    handle = model.blocks[2].register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    try:
        model.logits(batch)
        assert widths.count(len(PREFIX)) == 1
        trunk = model.trunk(batch, 0, whole=False)
        for _ in range(3):
            model.steer(batch, trunk, rows, edits_of([plan(1, (0,))], 4))
            model.logits(batch)
        assert widths.count(len(PREFIX)) == 2, "the prefix runs once bare and once under the plan"
        last = model.trunk(batch, 2, whole=False)
        widths.clear()
        model.steer(batch, last, rows, edits_of([plan(2, (2,))], 4))
        assert widths == [], "a block runs although only the last one is masked"
    finally:
        handle.remove()


@families
def test_recorded_states_are_those_of_the_last_prompt_token(lms: dict[str, Any], family: str) -> None:
    lm = lms[family]
    model = few_shot(lm, family)
    batch = padded()
    logits, states = model.record(batch, [0, 1, 2])
    torch.testing.assert_close(logits, model.logits(batch))
    for row, text in enumerate(TEXTS):
        expected = reference(lm, family, text, None)[1]
        for layer in range(LAYERS):
            torch.testing.assert_close(states[layer][row], expected[layer], atol=1e-4, rtol=1e-4)
    _, at_mlp = model.record(batch, [1], "mlp_output")
    outputs: list[Tensor] = []
    handle = model.blocks[1].get_submodule("mlp").register_forward_hook(lambda m, a, output: outputs.append(output))
    lm(torch.tensor([[*PREFIX, *TEXTS[1]]]))
    handle.remove()
    torch.testing.assert_close(at_mlp[1][1], outputs[0][0, -1], atol=1e-4, rtol=1e-4)
    _, mean = model.record(batch, [2], position="mean")
    handle = model.blocks[2].register_forward_hook(lambda m, a, output: outputs.append(output))
    lm(torch.tensor([[*PREFIX, *TEXTS[3]]]))
    handle.remove()
    torch.testing.assert_close(mean[2][3], outputs[1][0, len(PREFIX) :].mean(dim=0), atol=1e-4, rtol=1e-4)


@families
def test_masks_inside_a_block_are_applied_by_full_passes(lms: dict[str, Any], family: str) -> None:
    model = few_shot(lms[family], family)
    batch = padded()
    of = plan(3, (1,), "mlp_output")
    expected = [reference(lms[family], family, text, of)[0] for text in TEXTS]
    table = edits_of([of], 4)
    close(model.steer(batch, model.trunk(batch, 1, whole=False), torch.arange(4), table), expected)


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


@families
def test_greedy_scoring_equals_generate(lms: dict[str, Any], family: str) -> None:
    lm = lms[family]
    generated = [
        lm.generate(
            torch.tensor([[*PREFIX, *text]]), max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None
        )[0, -5:].tolist()
        for text in TEXTS
    ]
    texts = (f"W{generated[0][0]}", words(generated[0][:2]), " " + words(generated[1]), "never")
    model = few_shot(lm, family, scoring="greedy", decode=words, label_texts=texts)
    found = model.logits(padded())
    folded = [text.strip().casefold() for text in texts]
    for row, ids in enumerate(generated):
        matching = [k for k, text in enumerate(folded) if words(ids).startswith(text)]
        expected = torch.full((len(LABELS),), NOT_DECODED)
        if matching:
            expected[max(matching, key=lambda k: len(folded[k]))] = 0.0
        assert torch.equal(found[row], expected)
    assert found[0, 1] == 0.0, "the longer of two matching labels does not win"
    of = plan(1, (0, 2))
    table = edits_of([of], 4)
    steered = model.steer(padded(), model.trunk(padded(), 0, whole=True), torch.arange(4), table)
    assert torch.equal(steered, model.hooked(padded(), edits_of([of], 4)))
    assert torch.equal(table.masked > 0, torch.ones(4, dtype=torch.bool))


def test_sliding_window_model_is_scored_by_full_passes() -> None:
    lm = language_model(
        "qwen2",
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
    )
    model = few_shot(lm, "qwen2")
    assert not model.splits
    of = plan(1, (0,))
    expected = [reference(lm, "qwen2", text, of)[0] for text in TEXTS]
    table = edits_of([of], 4)
    close(model.steer(padded(), model.trunk(padded(), 0, whole=True), torch.arange(4), table), expected)


class OwnMask(GPT2Model):
    """A model that replaces a given mask by a causal one, so that branches attend to each other."""

    def forward(self, *args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        if attention_mask.ndim == 4:
            rows, columns = attention_mask.shape[-2:]
            unseen = torch.ones((rows, columns)).triu(columns - rows + 1).bool()
            attention_mask = torch.zeros_like(attention_mask).masked_fill(unseen, torch.finfo(torch.float32).min)
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


def test_model_that_gets_branches_wrong_is_scored_by_full_passes() -> None:
    lm = language_model("gpt2")
    lm.transformer.__class__ = OwnMask
    labels = ((20,), (21,), (22,), (20, 23, 24))  # only the last one has several tokens, so a branch
    model = FewShotModel(lm, FAMILIES["gpt2"], PREFIX, labels)
    split = model.logits(padded())
    model.check(padded())
    assert not model.splits
    plain = model.logits(padded())
    torch.testing.assert_close(split[:, :3], plain[:, :3], atol=2e-5, rtol=1e-5)
    assert (split[:, 3] - plain[:, 3]).abs().max() > 1e-2, "branches are right: nothing to detect"


@families
def test_greedy_scoring_at_the_last_block_caches_no_prefix(lms: dict[str, Any], family: str) -> None:
    model = few_shot(lms[family], family, scoring="greedy", decode=words, label_texts=("a", "b", "c", "d"))
    widths: list[int] = []
    handle = model.blocks[LAYERS - 1].register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    try:
        for seed in (1, 2, 3):
            table = edits_of([plan(seed, (LAYERS - 1,))], 4)
            model.steer(padded(), model.trunk(padded(), LAYERS - 1, whole=False), torch.arange(4), table)
    finally:
        handle.remove()
    assert not model._prefixes._plans, "an entry of zero bytes would never be evicted"
    assert widths.count(len(PREFIX)) == 1


@pytest.mark.parametrize(("labels", "named"), [(LABELS, "'d'"), (LABELS[1:], None)])
def test_label_that_is_a_prefix_of_another_is_reported(
    lms: dict[str, Any], caplog: pytest.LogCaptureFixture, labels: tuple[tuple[int, ...], ...], named: str | None
) -> None:
    """The sum of log-probabilities of a prefix is never the smaller one, so the longer label never wins."""
    texts = ("d", "e", "f", "g")[: len(labels)]
    model = FewShotModel(lms["gpt2"], FAMILIES["gpt2"], PREFIX, labels, label_texts=texts)
    model.check(padded())
    messages = [record.message for record in caplog.records if record.name == "workers.models.few_shot.model"]
    assert [named in message for message in messages] == ([] if named is None else [True])


def test_label_without_tokens_is_rejected(lms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no token"):
        FewShotModel(lms["gpt2"], FAMILIES["gpt2"], PREFIX, ((1,), ()))
