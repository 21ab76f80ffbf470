"""The description of a loaded model. Without torch: an HTTP process before a fleet has nothing else."""

from dataclasses import dataclass
from typing import Literal

from range_store.domain.range_set import ModelIdentity
from workers.models.predictions import Activation, activation_of


@dataclass(frozen=True)
class ModelFacts:
    """A classifier as others see it.

    Attributes:
        dtype: name of its parameters' type, e.g. "float32". device: where they are, e.g. "cuda:0".
        source: directory of the checkpoint, or its name on the hub.
        max_tokens: most tokens of a text, special tokens included.
        splits: whether it runs as trunk and tail; else erasures need full passes with hooks.
        template: prompt template of a few-shot classifier, with its version.
        prefix_tokens: tokens before every text: instruction and exemplars of a few-shot classifier.
        truncation_side: where a text that is too long is cut.
        earlier_fingerprint: the fingerprint that earlier versions computed for the model.
        empty_logits: logits of a text whose states are all zero after a block, by block; none for few-shot classifiers.
    """

    identity: ModelIdentity
    problem_type: str | None
    dtype: str
    device: str
    source: str
    max_tokens: int
    splits: bool
    template: str | None = None
    prefix_tokens: int = 0
    truncation_side: Literal["left", "right"] = "right"
    earlier_fingerprint: str | None = None
    empty_logits: tuple[tuple[float, ...], ...] = ()

    @property
    def activation(self) -> Activation:
        """How scores follow from logits where a request does not say."""
        if self.identity.kind != "sequence-classification":
            return "softmax"
        return activation_of(self.problem_type, len(self.identity.labels))
