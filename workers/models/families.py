"""How model families differ. To support another, add a row and see `docs/models.md`.

Every row is checked at load against hooked full passes (`SteeredModel.check`), so a wrong row ends in an error or in
slower full passes, never in a wrong answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from workers.models.errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        blocks: dotted path of the block list inside the `…ForSequenceClassification` model, or a language model.
        reads: which token's state the head reads: "first", or "last" real one.
        call: keyword arguments for every forward call.
        positions_after_pad: the first position embedding in use is the one after the pad id (RoBERTa).
        mlp: dotted path, inside a block, of the module whose output is `mlp_output`, [B, T, D].
        causal: the family has language models too, for the kinds `label-token` and `few-shot`.
    """

    blocks: str
    reads: Literal["first", "last"]
    mlp: str
    call: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    positions_after_pad: bool = False
    causal: bool = False


_NO_CACHE = MappingProxyType({"use_cache": False})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family("bert.encoder.layer", "first", "output.dense"),
        "distilbert": Family("distilbert.transformer.layer", "first", "ffn"),
        "roberta": Family("roberta.encoder.layer", "first", "output.dense", positions_after_pad=True),
        "electra": Family("electra.encoder.layer", "first", "output.dense"),
        "gpt2": Family("transformer.h", "last", "mlp", _NO_CACHE, causal=True),
        "llama": Family("model.layers", "last", "mlp", _NO_CACHE, causal=True),
        "qwen2": Family("model.layers", "last", "mlp", _NO_CACHE, causal=True),
    }
)


def family_of(model_type: str) -> Family:
    """The row for a config's `model_type`.

    Raises:
        UnsupportedModel: there is none; the error lists the supported families.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise UnsupportedModel(
            f"model family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        ) from None
