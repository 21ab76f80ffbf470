"""What a fleet and its replicas tell each other. Errors travel as data: pickled, ours would lose their fields."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from range_store.domain.erasure import Erasure
from range_store.errors import RangeStoreError
from workers.engine.answers import Answer, Load, Logits, Source, TextAnswer
from workers.engine.errors import EngineError, EngineFailed
from workers.models.errors import ModelError
from workers.models.texts import TextOrPair


@dataclass(frozen=True)
class RequestContext:
    """What a request is called where it came in: its id, and its place in a trace as a `traceparent`."""

    request_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, eq=False)
class RemoteRequest:
    """One request. `timeout`: seconds that are left of its time."""

    texts: Sequence[TextOrPair]
    erase: Sequence[Erasure] | None
    compare: bool
    truncate: bool
    timeout: float | None
    min_generation: str | None
    origin: RequestContext = RequestContext()


@dataclass(frozen=True, eq=False)
class PackedAnswer:
    """An `Answer`, its texts packed into arrays: logits and baselines [N, K], one row of counts per text.

    `counts`: masked neurons, whether it was truncated, tokens, whether it has a baseline.
    """

    logits: Logits
    baselines: Logits | None
    counts: Any
    source: Source
    erasures: tuple[Erasure, ...]
    enforced: frozenset[str]
    range_set: str | None
    generation: str | None
    queued_seconds: float
    running_seconds: float

    @classmethod
    def of(cls, answer: Answer) -> "PackedAnswer":
        texts = answer.texts
        baselines = [text.baseline for text in texts if text.baseline is not None]
        counts = [(text.masked_neurons, text.truncated, text.tokens, text.baseline is not None) for text in texts]
        return cls(
            np.stack([text.logits for text in texts]) if texts else np.empty((0, 0), np.float32),
            np.stack(baselines) if baselines else None,
            np.array(counts, np.int64).reshape(-1, 4),
            answer.source,
            answer.erasures,
            answer.enforced,
            answer.range_set,
            answer.generation,
            answer.queued_seconds,
            answer.running_seconds,
        )

    def answer(self, replica: str) -> Answer:
        return Answer(
            tuple(self._texts()),
            self.source,
            self.erasures,
            self.enforced,
            self.range_set,
            self.generation,
            self.queued_seconds,
            self.running_seconds,
            replica,
        )

    def _texts(self) -> Iterator[TextAnswer]:
        baselines = iter(self.baselines if self.baselines is not None else ())
        for logits, (masked, truncated, tokens, compared) in zip(self.logits, self.counts.tolist(), strict=True):
            yield TextAnswer(logits, next(baselines) if compared else None, masked, bool(truncated), tokens)


@dataclass(frozen=True)
class PackedError:
    """An error: the name of its class, its message and its fields."""

    kind: str
    message: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: Exception) -> "PackedError":
        return cls(type(error).__name__, str(error), dict(vars(error)))

    def error(self) -> Exception:
        """The error again, of the same class and with the same fields."""
        kind = _KINDS.get(self.kind, EngineFailed)
        error = kind.__new__(kind, self.message)
        vars(error).update(self.fields)
        return error


@dataclass(frozen=True, eq=False)
class CallReply:
    """What a replica says to the requests of one call, in their order; and how it is. `gone`: it takes no more."""

    replica: str
    outcomes: tuple[PackedAnswer | PackedError, ...]
    load: Load
    gone: bool = False


def _kinds(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


EXPECTED_ERRORS = (EngineError, RangeStoreError, ModelError)
"""What a replica tells as it is; anything else is a fault of the program, and in its log."""
_KINDS = {kind.__name__: kind for base in EXPECTED_ERRORS for kind in _kinds(base)}
