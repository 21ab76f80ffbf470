"""Errors between a checkpoint and an answer.

ModelError
├── CheckpointError      no such checkpoint, pickled weights, missing head, unreadable files
├── UnsupportedModel     a family that `families.py` does not describe
├── PredictsNoLabels     a regression model, where labels are compared
└── TextError            a text that the model cannot take
    ├── TextTooLong      more tokens than the model has positions, with truncate: false
    ├── EmptyText        no token at all, so there is no state to read
    ├── UnknownToken     a token of the tokenizer that the model has no embedding for
    └── PairUnsupported  a pair of texts, where the classifier has a place for one
"""


class ModelError(Exception):
    """Base of the errors of this package."""


class CheckpointError(ModelError):
    """The checkpoint cannot be loaded as it is."""


class UnsupportedModel(ModelError):
    """The checkpoint's family is not described in `workers/models/families.py`."""


class PredictsNoLabels(ModelError):
    """A regression model predicts values, and no label to compare with a text's own."""

    def __init__(self, model: str, what: str) -> None:
        super().__init__(f"{model} is a regression model, which predicts no labels: {what} needs a classifier")


class TextError(ModelError):
    """A text that the model cannot take. `index` is its place in the request."""

    def __init__(self, index: int, message: str) -> None:
        self.index = index
        super().__init__(message)


class TextTooLong(TextError):
    """More tokens than the model has positions for, without truncation."""

    def __init__(self, index: int, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(index, f"input {index} has {tokens} tokens, the model takes {limit}: shorten it or truncate")


class EmptyText(TextError):
    """The text gives no token, and this model adds none of its own."""

    def __init__(self, index: int) -> None:
        super().__init__(index, f"input {index} has no token that the model can read")


class UnknownToken(TextError):
    """A token of the tokenizer that the model has no embedding for."""

    def __init__(self, index: int, token: str, token_id: int, rows: int) -> None:
        problem = f"holds the token {token!r} ({token_id}), and the model has embeddings for 0 to {rows - 1} only"
        super().__init__(index, f"input {index} {problem}: leave it out")


class PairUnsupported(TextError):
    """A pair of texts, for a classifier whose prompt, or whose `<sep>`, closes one text."""

    def __init__(self, index: int) -> None:
        reason = "a label-token or few-shot classifier takes single texts: join the two"
        super().__init__(index, f"input {index} is a pair of texts, and {reason}")
