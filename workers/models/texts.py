"""Texts, and their tokens as people look at them. Without torch."""

from dataclasses import dataclass

TextPair = tuple[str, str]
"""Hugging Face's `text` and `text_pair`."""
TextOrPair = str | TextPair


def characters(text: TextOrPair) -> int:
    """Length of a text, or of both texts of a pair."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


@dataclass(frozen=True)
class TokenInfo:
    """One token of a text.

    Attributes:
        text: the token as it stands in the vocabulary.
        start, stop: its characters in the text; None for a `special` token, which is not of the text, or where the
            tokenizer cannot tell.
        read: whether the head reads the state at it.
    """

    id: int
    text: str
    start: int | None
    stop: int | None
    special: bool
    read: bool


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens as the model gets them. `total`: their number before truncation."""

    tokens: tuple[TokenInfo, ...]
    total: int
    truncated: bool
