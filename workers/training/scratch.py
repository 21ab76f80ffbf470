"""A small causal LM from scratch: a tokenizer trained on the corpus, and a model with random weights."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from workers.corpora.corpus import Corpus
from workers.models.errors import CheckpointError
from workers.models.families import FAMILIES

EOS, PAD = "<eos>", "<pad>"


@dataclass(frozen=True)
class NewModel:
    """Sizes of a new model. config: transformers settings as JSON text; they take precedence over the sizes."""

    family: str
    layers: int = 6
    hidden: int = 256
    heads: int = 4
    vocabulary: int = 8000
    max_positions: int = 512
    config: str | None = None


def new_tokenizer(corpus: Corpus, size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens, trained on the corpus. It can encode every character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD
    )


def new_model(new: NewModel, tokenizer: Any) -> Any:
    """A causal LM with random weights. The caller seeds torch.

    Raises:
        CheckpointError: the family has no causal LM, or the sizes do not fit together.
    """
    causal = [name for name, family in FAMILIES.items() if family.causal]
    if new.family not in causal:
        raise CheckpointError(f"invalid family {new.family!r} of a new model: expected one of {', '.join(causal)}")
    if new.hidden % new.heads:
        raise CheckpointError(f"{new.hidden} neurons cannot be divided among {new.heads} heads")
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    if new.family == "gpt2":
        sizes |= {"n_embd": new.hidden, "n_layer": new.layers, "n_head": new.heads, "n_positions": new.max_positions}
    else:
        sizes |= {
            "hidden_size": new.hidden,
            "num_hidden_layers": new.layers,
            "num_attention_heads": new.heads,
            "num_key_value_heads": max(1, new.heads // 2),
            "intermediate_size": 8 * new.hidden // 3 // 32 * 32 or 32,
            "max_position_embeddings": new.max_positions,
        }
    tokenizer.model_max_length = new.max_positions
    try:
        own = json.loads(new.config) if new.config else {}
        config = AutoConfig.for_model(new.family, **{**sizes, **own})
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"a {new.family} of these sizes cannot be made: {str(error).splitlines()[0]}") from error


def _texts(corpus: Corpus) -> Iterator[str]:
    for chunk in corpus.chunks():
        yield from (text.encode("utf-8", "replace").decode("utf-8") for text in chunk.texts)
