"""Tiny checkpoints of every supported family: random weights, real architecture, a tokenizer of their own."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from workers.corpora.loading import load_corpus
from workers.training.recipes import LabelToken

SENTENCES = (
    "The home side won the cup final after extra time and a storm of late goals.",
    "Shares of the miner fell when the central bank raised its rate again.",
    "A probe sent back pictures of a frozen moon with plumes of water vapour.",
    "Talks on the border ended without a treaty, and both capitals recalled their envoys.",
    "Researchers trained a small network to read handwriting from the nineteenth century.",
    "The striker limped off, the keeper was sent off, and nobody in the ground sat down.",
    "Prices of wheat rose for a third week as ports stayed closed.",
    "Voters queued before dawn in the first election since the generals left.",
)

LABELS = ("World", "Sports", "Business", "SciTech")
WORDPIECE = ("bert", "distilbert", "electra")


def save_tiny(
    family: str,
    directory: Path,
    *,
    n_layers: int = 3,
    hidden: int = 32,
    labels: tuple[str, ...] = LABELS,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random checkpoint of `family` to `directory`: weights far from zero, so that masking shows."""
    tokenizer = _wordpiece() if family in WORDPIECE else _byte_level(family)
    if family in WORDPIECE or family == "roberta":
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        types = ["token_type_ids"] if family in ("bert", "electra") else []
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_input_names=["input_ids", *types, "attention_mask"], **special
        )
    else:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.model_max_length = 64
    sizes: dict[str, Any] = {"vocab_size": len(fast), "pad_token_id": fast.pad_token_id, "num_labels": len(labels)}
    match family:
        case "distilbert":
            sizes |= {"dim": hidden, "n_layers": n_layers, "n_heads": 4, "hidden_dim": 2 * hidden}
            sizes |= {"max_position_embeddings": 64}
        case "gpt2":
            sizes |= {"n_embd": hidden, "n_layer": n_layers, "n_head": 4, "n_positions": 64}
        case _:
            sizes |= {"hidden_size": hidden, "num_hidden_layers": n_layers, "num_attention_heads": 4}
            sizes |= {"intermediate_size": 2 * hidden, "max_position_embeddings": 66}
    if family in ("llama", "qwen2"):
        sizes |= {"num_key_value_heads": 2}
    if family == "electra":
        sizes |= {"embedding_size": hidden // 2}
    settings = AutoConfig.for_model(family, **{**sizes, **config})
    settings.id2label = dict(enumerate(labels))
    settings.label2id = {label: index for index, label in enumerate(labels)}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)  # the usual initialisation is so small that all texts look alike
    _answer_by_text(model, fast)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@torch.no_grad()
def _answer_by_text(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Turn the head so that its answers differ by text: a random head gives one class to whatever it reads.

    What the states of all sentences have in common no longer counts, and the logits get a standard deviation of 1.
    """
    head = [each for each in model.modules() if isinstance(each, torch.nn.Linear)][-1]
    states: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0].reshape(-1, head.in_features)[-1]))
    model.eval()
    for text in SENTENCES:
        model(**tokenizer(text, return_tensors="pt"))
    hook.remove()
    mean = torch.stack(states).mean(0)
    head.weight -= torch.outer(head.weight @ mean, mean) / mean.dot(mean)
    head.weight *= 1.0 / (torch.stack(states) @ head.weight.T).std()


def save_language_model(family: str, directory: Path, *, positions: int = 128, seed: int = 1) -> Path:
    """Write a random causal LM of `family`, as people download them: no labels, no head for them."""
    fast = PreTrainedTokenizerFast(tokenizer_object=_byte_level(family), eos_token="<eos>", pad_token="<eos>")
    fast.model_max_length = positions
    sizes: dict[str, Any] = {"vocab_size": len(fast), "pad_token_id": fast.pad_token_id}
    if family == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": positions}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 64, "max_position_embeddings": positions}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def save_label_token(family: str, directory: Path, labels: tuple[str, ...] = LABELS) -> Path:
    """Write a random label-token classifier of `family`."""
    base = save_language_model(family, directory / "lm")
    rows = [{"text": text, "label": label} for text, label in zip(SENTENCES, labels * 2, strict=False)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(2)
    task = LabelToken.of(str(base), load_corpus(str(directory / "rows.jsonl"), labels=labels))
    with torch.no_grad():
        new = [*task.tokens.ids, task.tokens.sep]  # all alike before they are trained
        task.model.get_input_embeddings().weight[new] = torch.randn(len(new), task.model.config.hidden_size)
        task.model.get_output_embeddings().weight[new] = torch.randn(len(new), task.model.config.hidden_size)
    task.model.save_pretrained(directory / "model")
    task.tokenizer.save_pretrained(directory / "model")
    return directory / "model"


TEMPLATE: dict[str, Any] = {
    "name": "tiny",
    "version": 1,
    "instruction": "Say it.",
    "before_text": "Item: ",
    "after_text": "\nKind:",
    "labels": [
        {"label": "World", "text": " envoys met"},
        {"label": "Sports", "text": " cup"},
        {"label": "Business", "text": " shares of the miner"},
        {"label": "SciTech", "text": " probe"},
    ],
    "exemplars": [{"text": "she won", "label": "Sports"}],
}
"""A prompt template whose label strings differ in length."""


def _wordpiece() -> Tokenizer:
    """The words of the sentences, their letters and their pairs of letters; put together here, since what a trainer
    learns from the same sentences differs from process to process.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [word for text in SENTENCES for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    parts = {(word[at : at + size], at) for word in words for size in (1, 2) for at in range(len(word))}
    pieces = sorted({*words, *(part if not at else f"##{part}" for part, at in parts)})
    vocabulary = {piece: index for index, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    _close(tokenizer, "[SEP] $B:1 [SEP]:1")
    return tokenizer


def _byte_level(family: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if family == "roberta" else ["<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if family == "roberta":
        _close(tokenizer, "[SEP] [SEP] $B [SEP]")
    return tokenizer


def _close(tokenizer: Tokenizer, second: str) -> None:
    """Texts become [CLS] … [SEP]; of a pair, `second` is what follows the first text."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A {second}", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
