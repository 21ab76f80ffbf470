"""From a prompt template and a language model to a few-shot classifier and its tokenizer."""

from itertools import chain
from typing import Any

from workers.models.errors import CheckpointError
from workers.models.families import Family
from workers.models.few_shot.model import FewShotModel, Scoring
from workers.models.few_shot.prompt_templates import PromptTemplate
from workers.models.tokens import TextTokenizer


def few_shot_classifier(
    model: Any,
    tokenizer: Any,
    family: Family,
    template: PromptTemplate,
    scoring: Scoring,
    max_tokens: int,
    pad: int,
    n_embeddings: int | None = None,
) -> tuple[FewShotModel, TextTokenizer]:
    """A pretrained LM as a few-shot classifier, and the tokenizer of its texts.

    Args:
        max_tokens: most tokens that the model takes. n_embeddings: see `TextTokenizer`.

    Raises:
        CheckpointError: prompt and labels leave no room for a text, or hold a token that the model does not know.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    prefix, suffix = bos + ids(template.prefix()), ids(template.after_text)
    labels = tuple(ids(label.text) for label in template.labels)
    if n_embeddings is not None and max(chain(prefix, suffix, *labels)) >= n_embeddings:
        raise CheckpointError(
            f"the prompt {template.name!r} holds a token that the model has no embedding for: use another template"
        )
    room = max_tokens - len(prefix) - max(map(len, labels))
    if scoring == "greedy":
        room -= FewShotModel.GREEDY_TOKENS
    if room <= len(suffix):
        raise CheckpointError(
            f"the prompt {template.name!r} has {len(prefix) + len(suffix)} tokens, the model takes {max_tokens}: "
            "use a template with fewer exemplars"
        )
    steered = FewShotModel(
        model,
        family,
        prefix,
        labels,
        scoring=scoring,
        decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        label_texts=tuple(label.text for label in template.labels),
    )
    return steered, TextTokenizer(tokenizer, room, pad, "last", suffix, n_embeddings=n_embeddings)
