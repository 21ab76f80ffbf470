"""On the same GPT-2 weights, logits equal those of the masks of the authors' released code.

The reference is written here in a few plain lines of torch and numpy, without any code of this project: a hook on a
block's output, every position, `np.std`, the floor of p·D, one text at a time.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from range_store.domain.erasure import Erasure
from range_store.domain.plan import resolve
from tests.workers.checkpoints import LABELS, save_label_token
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.edits.slot_table import SlotTable
from workers.edits.variants import Variants
from workers.fitting.fit import fit
from workers.models.loading import load_model

P, TAU = 0.3, 2.5


def released(
    path: Path, train: list[tuple[str, str]], texts: list[str], layer: int, target: str, method: str
) -> np.ndarray:
    """Logits of the label tokens, [n, K]."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    label_ids = [tokenizer.convert_tokens_to_ids(f"<label:{label}>") for label in LABELS]
    block = lm.transformer.h[layer]

    def prompt(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.convert_tokens_to_ids("<sep>")]])

    states = []
    for text, label in train:
        if label == target:
            handle = block.register_forward_hook(lambda m, i, out: states.append(out[0, -1].numpy()))
            with torch.no_grad():
                lm(prompt(text))
            handle.remove()
    own = np.array(states, dtype=np.float64)
    mean, std = np.mean(own, axis=0), np.std(own, axis=0)
    salient = np.argsort(-np.mean(np.abs(own), axis=0), kind="stable")[: int(P * own.shape[1])]

    def mask(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        masked = output.clone()
        for neuron in salient:
            low, high = mean[neuron] - TAU * std[neuron], mean[neuron] + TAU * std[neuron]
            inside = (output[..., neuron] >= low) & (output[..., neuron] <= high)
            masked[..., neuron] = torch.where(inside, 0.0, output[..., neuron]) if method == "range" else 0.0
        return masked

    handle = block.register_forward_hook(mask)
    with torch.no_grad():
        found = [lm(prompt(text)).logits[0, -1, label_ids].numpy() for text in texts]
    handle.remove()
    return np.array(found)


@pytest.mark.parametrize("method", ["neuron", "range"])
def test_masked_logits_equal_those_of_the_released_implementation(tmp_path: Path, method: str) -> None:
    path = save_label_token("gpt2", tmp_path)
    train = labelled_texts(120, seed=3)
    texts = [text for text, _ in labelled_texts(12, seed=4)]
    model = load_model(str(path), device="cpu")
    corpus = load_corpus(str(write_jsonl(tmp_path / "train.jsonl", train)), labels=LABELS)
    range_set = fit(model, corpus, layers="all", bins=16).range_set
    batch = model.tokens.batch(model.tokens.encode(texts))
    bare = model.steered.logits(batch).numpy()
    for layer in range(3):
        expected = released(path, train, texts, layer, "Sports", method)
        erasure = Erasure.model_validate(
            {"concept": "Sports", "method": method, "tau": TAU, "top_fraction": P, "layers": (layer,)}
        )
        plan = resolve(range_set, [erasure])
        trunk = model.steered.trunk(batch, layer, whole=False)
        table, rows = SlotTable(model.identity.hidden_size, model.device), torch.arange(12)
        served = Variants(model.steered, table, batch, trunk, [plan] * 12, rows[:, None]).run_all(4096).logits
        np.testing.assert_allclose(served[:, 0].numpy(), expected, atol=1e-5)
        measured = Variants(model.steered, table, batch, trunk, [plan], rows[None]).run_all(4096).logits
        np.testing.assert_allclose(measured[0].numpy(), expected, atol=1e-5)
        assert np.abs(expected - bare).max() > 1e-2, "the masking has no effect"
