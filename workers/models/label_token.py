"""Label-token classifiers (paper Appendix B): a causal LM reads `text <sep>` and predicts one added label token.

A checkpoint of this kind has an entry `neuronlens` in its `config.json`, so that it travels with the weights.
"""

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models.errors import CheckpointError

KIND = "label-token"
SEP = "<sep>"


def label_token(label: str) -> str:
    """The token that is added for a label."""
    return f"<label:{label}>"


@dataclass(frozen=True)
class LabelTokens:
    """The added tokens of a checkpoint: one id per label, and that of `<sep>`."""

    labels: tuple[str, ...]
    ids: tuple[int, ...]
    sep: int

    def to_config(self) -> dict[str, Any]:
        """The config's entry `neuronlens`."""
        return {
            "kind": KIND,
            "format": 1,
            **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()},
        }

    @classmethod
    def of(cls, config: Any, source: str) -> "LabelTokens | None":
        """The label tokens of a loaded config; None for a checkpoint of another kind.

        Raises:
            CheckpointError: the config's entry is invalid.
        """
        entry = getattr(config, "neuronlens", None)
        if not isinstance(entry, dict) or entry.get("kind") != KIND:
            return None
        try:
            tokens = cls(tuple(entry["labels"]), tuple(map(int, entry["ids"])), int(entry["sep"]))
            fits = all(0 <= token < config.vocab_size for token in (*tokens.ids, tokens.sep))
            if not fits or len(tokens.labels) != len(tokens.ids) or len(set(tokens.ids)) != len(tokens.ids):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"{source}: the label tokens in its config.json are damaged: train it again"
            ) from None
        return tokens


class LabelTokenClassifier(nn.Module):
    """A causal LM seen as a classifier: logits [B, K] of the K label tokens at the read position.

    The head is the rows of the LM's own output embedding that belong to labels; the rest of the vocabulary, and all
    other positions, are not computed.

    Args:
        lm: a transformers `…ForCausalLM`; it shares its weights.
        label_ids: token id of each label.
    """

    def __init__(self, lm: Any, label_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.config = lm.config
        self.body = lm.base_model_prefix
        self.add_module(self.body, lm.base_model)  # under its own name: the path to the blocks stays as it was
        head = lm.get_output_embeddings()
        chosen = torch.tensor(label_ids, device=head.weight.device)
        self.register_buffer("weight", head.weight.detach()[chosen].clone(), persistent=False)
        bias = getattr(head, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach()[chosen].clone(), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, read: Tensor, **call: Any) -> SimpleNamespace:
        """`.logits` [B, K]. read: position of `<sep>`, [B]."""
        body = getattr(self, self.body)
        hidden = body(input_ids=input_ids, attention_mask=attention_mask, **call).last_hidden_state
        state = hidden[torch.arange(len(hidden), device=hidden.device), read]
        return SimpleNamespace(logits=F.linear(state, self.weight, self.bias))  # type: ignore[arg-type]
