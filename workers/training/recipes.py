"""The kinds of classifier that can be trained: what is loaded, how a row is encoded, and the loss.

`sequence-classification` puts a new head on a checkpoint. `label-token` (paper Appendix B) adds one token per label to
a causal LM, trains it on `text <sep> label <eos>`, and takes the loss at the label token only. In a causal model, what
follows `<sep>` cannot change that loss, so it is not computed.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from workers.corpora.corpus import Corpus
from workers.models.errors import CheckpointError
from workers.models.families import family_of
from workers.models.label_token import SEP, LabelTokens, label_token
from workers.training.scratch import NewModel, new_model, new_tokenizer

Recipe = Literal["sequence-classification", "label-token"]


class Task(Protocol):
    """A model in training. `model` and `tokenizer` are saved at the end."""

    model: Any
    tokenizer: Any

    def rows(self, corpus: Corpus, max_length: int | None) -> datasets.Dataset:
        """Rows with `input_ids`, `attention_mask` and `labels` (the index of the label)."""
        ...

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of a padded batch, and its logits over labels [B, K]."""
        ...

    @property
    def collator(self) -> Any: ...


@dataclass
class SequenceClassification:
    """A checkpoint with a new head for the labels."""

    model: Any
    tokenizer: Any
    labels: tuple[str, ...]

    @classmethod
    def of(cls, base: str, labels: tuple[str, ...]) -> "SequenceClassification":
        """Raises CheckpointError if `base` cannot be loaded, UnsupportedModel for an unknown family."""
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            family_of(config.model_type)
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
            tokenizer = _tokenizer(base)
            config.pad_token_id = tokenizer.pad_token_id
            model = AutoModelForSequenceClassification.from_pretrained(
                base, config=config, use_safetensors=True, trust_remote_code=False, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError) as error:
            raise _cannot_load(base, error) from error
        return cls(model, tokenizer, labels)

    @property
    def collator(self) -> Any:
        return DataCollatorWithPadding(self.tokenizer)

    def rows(self, corpus: Corpus, max_length: int | None) -> datasets.Dataset:
        limit = max_length or min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings - 2)
        index = {label: number for number, label in enumerate(self.labels)}
        return _dataset(corpus, self.tokenizer, index, limit, suffix=())

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return F.cross_entropy(logits, inputs["labels"]), logits


@dataclass
class LabelToken:
    """A causal LM with added tokens: `<sep>`, and one per label."""

    model: Any
    tokenizer: Any
    tokens: LabelTokens

    @classmethod
    def of(cls, base: str | NewModel, corpus: Corpus) -> "LabelToken":
        """A checkpoint, or a new model with a tokenizer trained on `corpus`.

        Raises:
            CheckpointError: the model cannot be loaded or made. UnsupportedModel: the family is unknown.
        """
        labels = corpus.concepts
        if isinstance(base, NewModel):
            tokenizer = new_tokenizer(corpus, base.vocabulary)
            _add_tokens(tokenizer, labels)
            model = new_model(base, tokenizer)
        else:
            try:
                config = AutoConfig.from_pretrained(base, trust_remote_code=False)
                if not family_of(config.model_type).causal:
                    raise CheckpointError(f"{base} is a {config.model_type}, which is not a causal language model")
                tokenizer = _tokenizer(base)
                model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise _cannot_load(base, error) from error
            _add_tokens(tokenizer, labels)
            if len(tokenizer) > model.config.vocab_size:
                model.resize_token_embeddings(len(tokenizer))
            model.config.pad_token_id = tokenizer.pad_token_id
        ids = tuple(tokenizer.convert_tokens_to_ids([label_token(label) for label in labels]))
        tokens = LabelTokens(labels, ids, tokenizer.convert_tokens_to_ids(SEP))
        model.config.neuronlens = tokens.to_config()
        return cls(model, tokenizer, tokens)

    @property
    def collator(self) -> Any:
        return DataCollatorWithPadding(self.tokenizer)

    def rows(self, corpus: Corpus, max_length: int | None) -> datasets.Dataset:
        limit = max_length or min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        index = {label: number for number, label in enumerate(self.tokens.labels)}
        return _dataset(corpus, self.tokenizer, index, limit, suffix=(self.tokens.sep,))

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = model.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        sep = inputs["attention_mask"].sum(dim=1) - 1
        scores = model.get_output_embeddings()(hidden[torch.arange(len(hidden), device=hidden.device), sep])
        ids = torch.tensor(self.tokens.ids, device=scores.device)
        return F.cross_entropy(scores, ids[inputs["labels"]]), scores[:, ids]


def _add_tokens(tokenizer: Any, labels: tuple[str, ...]) -> None:
    added = [SEP, *(label_token(label) for label in labels)]
    tokenizer.add_tokens(added, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(added)
    if len(set(ids)) != len(added):
        raise CheckpointError("the tokenizer has tokens of the same name as the label tokens already")


def _tokenizer(base: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _cannot_load(base: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot load {base!r}: {str(error).splitlines()[0]}")


def _dataset(
    corpus: Corpus, tokenizer: Any, index: dict[str, int], limit: int, suffix: tuple[int, ...]
) -> datasets.Dataset:
    """Token ids and label index of every row, cut so that the suffix fits. Texts without a token are omitted."""
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for chunk in corpus.chunks():
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in chunk.texts]
        encoded = tokenizer(
            clean,
            truncation=True,
            max_length=limit - len(suffix),
            add_special_tokens=not suffix,
            return_token_type_ids=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for ids, concept in zip(encoded, chunk.concepts, strict=True):
            if ids or suffix:
                columns["input_ids"].append([*ids, *suffix])
                columns["attention_mask"].append([1] * (len(ids) + len(suffix)))
                columns["labels"].append(index[concept])
    return datasets.Dataset.from_dict(columns)


def lengths_of(rows: datasets.Dataset) -> list[int]:
    """Number of tokens of each row."""
    return [int(n) for n in np.fromiter((len(ids) for ids in rows["input_ids"]), dtype=np.int64, count=len(rows))]
