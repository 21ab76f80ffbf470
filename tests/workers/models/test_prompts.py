"""Prompt templates, built in and from files, their errors, and models prompted with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.workers.checkpoints import save_language_model, save_tiny
from workers.corpora.paper_datasets import PAPER_DATASETS
from workers.models.errors import CheckpointError, TextTooLong
from workers.models.few_shot.prompt_templates import TEMPLATES, load_template
from workers.models.loading import load_model

SMALL: dict[str, Any] = {
    "name": "small",
    "version": 3,
    "instruction": "Say it.",
    "before_text": "Item: ",
    "after_text": "\nKind:",
    "labels": [{"label": "Sports", "text": " cup"}, {"label": "World", "text": " envoys met"}],
    "exemplars": [{"text": "she won", "label": "Sports"}],
}


def write(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps({**SMALL, **changes}))
    return str(path)


@pytest.mark.parametrize("name", sorted(PAPER_DATASETS))
def test_every_known_data_set_has_a_template_with_its_labels(name: str) -> None:
    template = load_template(name)
    assert tuple(each.label for each in template.labels) == PAPER_DATASETS[name].labels
    assert {exemplar.label for exemplar in template.exemplars} == set(PAPER_DATASETS[name].labels)
    assert load_template(template.id) == template
    assert template.prefix().endswith(template.between + template.before_text)
    for exemplar in template.exemplars:
        assert exemplar.text in template.prefix()


def test_built_in_files_are_named_after_template_and_version() -> None:
    for path in TEMPLATES.glob("*.json"):
        template = load_template(str(path))
        assert path.name == f"{template.name}.v{template.version}.json"


def test_prompt_has_the_layout_of_its_template(tmp_path: Path) -> None:
    template = load_template(write(tmp_path / "small.json"))
    assert template.prefix() + "he lost" + template.after_text == (
        "Say it.\n\nItem: she won\nKind: cup\n\nItem: he lost\nKind:"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": SMALL["labels"][:1]}, "labels"),
        ({"labels": [*SMALL["labels"], {"label": "Sports", "text": " x"}]}, "'Sports' occurs twice"),
        ({"labels": [*SMALL["labels"], {"label": "Other", "text": " cup"}]}, "' cup' occurs twice"),
        ({"labels": [*SMALL["labels"], {"label": "Other", "text": "Cup "}]}, "'Cup ' and ' cup' differ only in case"),
        ({"exemplars": [{"text": "x", "label": "Weather"}]}, "Weather"),
        ({"version": 0}, "version"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_error_names_the_fault_of_a_template(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_template(write(tmp_path / "bad.json", **changes))


def test_unknown_and_unreadable_templates_are_errors(tmp_path: Path) -> None:
    for name in ("news", "ag_news@9", "ag_news@x"):
        with pytest.raises(CheckpointError, match=r"ag_news@1"):
            load_template(name)
    (tmp_path / "half.json").write_text('{"name": ')
    for path in (tmp_path / "half.json", tmp_path / "none.json"):
        with pytest.raises(CheckpointError, match="not a valid prompt template"):
            load_template(str(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 language model with the tokenizer of the other tiny checkpoints."""
    return save_language_model("gpt2", tmp_path_factory.mktemp("lm") / "lm")


def test_prompted_language_model_is_a_few_shot_classifier(checkpoint: Path, tmp_path: Path) -> None:
    template = write(tmp_path / "small.json")
    model = load_model(str(checkpoint), device="cpu", template=template)
    assert (model.identity.kind, model.identity.labels) == ("few-shot", ("Sports", "World"))
    assert model.steered.splits
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    prompt = load_template(template)
    lm = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    expected = []
    for label in prompt.labels:
        string = ids(label.text)
        front = [*([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []), *ids(prompt.prefix())]
        whole = [*front, *ids("the cup final"), *ids(prompt.after_text), *string]
        log = lm(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        start = len(whole) - len(string) - 1
        expected.append(sum(float(log[start + i, token]) for i, token in enumerate(string)))
    (text,) = model.tokens.encode(["the cup final"])
    found = model.steered.logits(model.tokens.batch([text]))[0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_fingerprint_depends_on_template_and_scoring(checkpoint: Path, tmp_path: Path) -> None:
    template = write(tmp_path / "a.json")
    fingerprints = {
        load_model(str(checkpoint), device="cpu", template=template).identity.fingerprint,
        load_model(str(checkpoint), device="cpu", template=template, scoring="greedy").identity.fingerprint,
        load_model(
            str(checkpoint), device="cpu", template=write(tmp_path / "b.json", instruction="Do.")
        ).identity.fingerprint,
    }
    assert len(fingerprints) == 3


def test_long_texts_are_truncated_and_long_prompts_rejected(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(str(checkpoint), device="cpu", template=write(tmp_path / "a.json"))
    suffix = model.tokens.suffix
    (text,) = model.tokens.encode(["word " * 500])
    assert text.truncated
    assert text.ids[-len(suffix) :] == suffix
    model.steered.logits(model.tokens.batch([text]))
    with pytest.raises(TextTooLong):
        model.tokens.encode(["word " * 500], truncate=False)
    with pytest.raises(CheckpointError, match="fewer exemplars"):
        load_model(str(checkpoint), device="cpu", template=write(tmp_path / "b.json", instruction="word " * 300))


def test_prompt_requires_a_language_model(tmp_path: Path) -> None:
    bert = save_tiny("bert", tmp_path / "bert")
    with pytest.raises(CheckpointError, match="not a causal language model"):
        load_model(str(bert), device="cpu", template=write(tmp_path / "a.json"))
    headed = save_tiny("gpt2", tmp_path / "gpt2")
    assert load_model(str(headed), device="cpu").identity.kind == "sequence-classification"
