"""The messages between an ingress and its replicas. Errors travel as data: pickled, ours would lose their fields."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from range_store.domain.erasure import Erasure
from range_store.errors import RangeStoreError
from workers.engine.answers import Answer, Load, Logits, TextAnswer
from workers.engine.errors import EngineError
from workers.models.errors import ModelError
from workers.models.texts import TextOrPair

EXPECTED_ERRORS = (EngineError, RangeStoreError, ModelError)
"""Errors that a replica sends as they are. Any other is a fault of the program, and belongs in the replica's log."""


@dataclass(frozen=True)
class RequestContext:
    """How a request is identified where it came in: its id, and its place in a trace as a `traceparent`."""

    request_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, eq=False)
class RemoteRequest:
    """One request: the arguments of `Engine.classify`."""

    texts: Sequence[TextOrPair]
    erase: Sequence[Erasure] | None
    compare: bool
    truncate: bool
    timeout: float | None
    min_generation: str | None
    context: RequestContext = RequestContext()


@dataclass(frozen=True, eq=False)
class PackedAnswer:
    """An `Answer` with its texts as arrays, which serialize faster than an object for each text.

    Attributes:
        answer: the answer, without its texts.
        logits: [N, K]. baselines: [M, K], those of the texts that have one.
        counts: [N, 4]: masked neurons, whether it was truncated, tokens, whether it has a baseline.
    """

    answer: Answer
    logits: Logits
    baselines: Logits
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, answer: Answer) -> "PackedAnswer":
        texts, none = answer.texts, np.empty((0, 0), np.float32)
        baselines = [text.baseline for text in texts if text.baseline is not None]
        counts = [(text.masked_neurons, text.truncated, text.tokens, text.baseline is not None) for text in texts]
        return cls(
            replace(answer, texts=()),
            np.stack([text.logits for text in texts]) if texts else none,
            np.stack(baselines) if baselines else none,
            np.array(counts, np.int64).reshape(-1, 4),
        )

    @property
    def generation(self) -> str | None:
        return self.answer.generation

    def unpack(self, replica: str) -> Answer:
        """The answer, as one that this replica gave."""
        baselines = iter(self.baselines)
        texts = tuple(
            TextAnswer(logits, next(baselines) if compared else None, masked, bool(truncated), tokens)
            for logits, (masked, truncated, tokens, compared) in zip(self.logits, self.counts.tolist(), strict=True)
        )
        return replace(self.answer, texts=texts, replica=replica)


@dataclass(frozen=True)
class PackedError:
    """An error as its class, message and fields."""

    kind: type[Exception]
    message: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: Exception) -> "PackedError":
        return cls(type(error), str(error), dict(vars(error)))

    def unpack(self) -> Exception:
        error = self.kind.__new__(self.kind, self.message)
        vars(error).update(self.fields)
        return error


@dataclass(frozen=True, eq=False)
class CallReply:
    """A replica's reply to the requests of one call, in their order, and its load. `ending`: it takes no more calls."""

    replica: str
    outcomes: tuple[PackedAnswer | PackedError, ...]
    load: Load
    ending: bool = False
