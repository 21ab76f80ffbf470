"""A text's tokens as people look at them. Without torch: whoever replies over HTTP needs no more."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShownToken:
    """One token for people to look at.

    text: as it stands in the vocabulary. start, stop: of its characters in the text; None for one that is not of the
    text (`special`), or where the tokenizer cannot tell. read: whether the head reads the state at it.
    """

    id: int
    text: str
    start: int | None
    stop: int | None
    special: bool
    read: bool


@dataclass(frozen=True)
class ShownText:
    """A text's tokens as the model gets them. `total`: how many they would be if none were cut off."""

    tokens: tuple[ShownToken, ...]
    total: int
    truncated: bool
