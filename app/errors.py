"""The one table of errors: HTTP status, code and exit code of everything that can go wrong.

Other parts follow from it. `app.http.problems` builds replies, `app.cli.exits` ends commands, the protocols of
`app.routes.dropin` choose their own words by status, and the Python client and the console know errors by status and
code; `tests/app/test_errors.py` compares them with this table.

Exception classes are named, not imported: importing some of them would load torch, which `--help` never needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
CONFLICT: Final = 4
INTERRUPTED: Final = 130

T = TypeVar("T")
TeiType = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer"]


@dataclass(frozen=True)
class Status:
    """What follows from an HTTP status."""

    exit_code: int
    client: str
    """Class of the Python client's error."""
    vllm: str = "BadRequestError"
    """`type` of vLLM's and OpenAI's errors."""
    tei: TeiType = "Validation"
    """`error_type` of text-embeddings-inference's errors."""


STATUSES: Final[Mapping[int, Status]] = {
    400: Status(USAGE, "InvalidRequest"),
    401: Status(FAILED, "AccessDenied", "AuthenticationError"),
    403: Status(FAILED, "AccessDenied", "PermissionDeniedError"),
    404: Status(CONFLICT, "NotFound", "NotFoundError"),
    405: Status(FAILED, "NeuronLensError"),
    408: Status(FAILED, "NeuronLensError"),
    409: Status(CONFLICT, "Conflict"),
    412: Status(CONFLICT, "StaleGeneration"),
    413: Status(USAGE, "TooLarge"),
    415: Status(USAGE, "InvalidRequest"),
    421: Status(FAILED, "NeuronLensError"),
    422: Status(USAGE, "InvalidRequest"),
    429: Status(FAILED, "Overloaded", "RateLimitError", "Overloaded"),
    431: Status(FAILED, "NeuronLensError"),
    500: Status(FAILED, "ServerError", "InternalServerError", "Backend"),
    502: Status(UNREACHABLE, "Unavailable", "InternalServerError"),  # sent by proxies only
    503: Status(UNREACHABLE, "Unavailable", "ServiceUnavailableError", "Unhealthy"),
    504: Status(UNREACHABLE, "DeadlineExceeded", "InternalServerError", "Backend"),
}


@dataclass(frozen=True)
class ErrorKind:
    """An error as HTTP clients and commands meet it."""

    code: str
    status: int
    exit_code: int
    client: str
    """Class of the Python client's error."""
    classes: tuple[str, ...]
    """Exceptions that mean it; none where only HTTP knows it, and `app.http.problems.ApiError` names its code."""
    retryable: bool
    """Of a 503: whether trying again helps, so that the reply has `Retry-After`."""


def _kind(
    code: str,
    status: int,
    *classes: str,
    exit_code: int | None = None,
    client: str | None = None,
    retryable: bool = True,
) -> ErrorKind:
    """A row of the table; exit code and client class follow from the status unless given."""
    row = STATUSES[status]
    exit_code = row.exit_code if exit_code is None else exit_code
    return ErrorKind(code, status, exit_code, client or row.client, classes, retryable)


_STORE, _ENGINE, _MODELS = "range_store.errors.", "workers.engine.errors.", "workers.models.errors."

ERRORS: Final = (
    _kind("malformed", 400),
    _kind("no_key", 401),
    _kind("bad_key", 401),
    _kind("wrong_scope", 403),
    _kind("fits_disabled", 403),
    _kind("enforced", 403, _STORE + "EnforcedErasure", exit_code=CONFLICT),
    _kind("unknown_concept", 404, _STORE + "UnknownConcept"),
    _kind("unknown_neuron", 404, _STORE + "UnknownNeuron"),
    _kind("unknown_range_set", 404, _STORE + "UnknownRangeSet"),
    _kind("unknown_model", 404),
    _kind("unknown_report", 404),
    _kind("unknown_job", 404, _STORE + "UnknownJob"),
    _kind("not_found", 404),
    _kind("method_not_allowed", 405),
    _kind("request_timeout", 408),
    _kind("foreign_range_set", 409, _STORE + "ForeignRangeSet"),
    _kind("dtype_mismatch", 409, _STORE + "DtypeMismatch"),
    _kind("unresolvable_erasure", 409, _STORE + "UnresolvableErasure"),
    _kind("range_set_in_use", 409, _STORE + "RangeSetInUse"),
    _kind("job_over", 409, _STORE + "JobOver"),
    _kind("idempotency_key_reused", 409, _STORE + "IdempotencyKeyReused"),
    _kind("stale_generation", 412, _STORE + "StaleGeneration"),
    _kind("body_too_large", 413),
    _kind("too_many_texts", 413),
    _kind("text_too_large", 413),
    _kind("request_too_large", 413, _ENGINE + "RequestTooLarge"),
    _kind("unsupported_media_type", 415),
    _kind("wrong_host", 421),
    _kind("invalid", 422),
    _kind("invalid_erasure", 422, _STORE + "InvalidErasure"),
    _kind("not_fitted", 422, _STORE + "NotFitted"),
    _kind("text_too_long", 422, _MODELS + "TextTooLong"),
    _kind("empty_text", 422, _MODELS + "EmptyText"),
    _kind("unsupported", 422, _MODELS + "PairUnsupported", _MODELS + "UnknownToken"),
    _kind("invalid_cursor", 422),
    _kind("stale_cursor", 422),
    _kind("unusable_data", 422),
    _kind("queue_full", 429, _ENGINE + "QueueFull"),
    _kind("rate_limited", 429),
    _kind("fit_queue_full", 429, _STORE + "JobQueueFull"),
    _kind("too_many_streams", 429),
    _kind("head_too_large", 431),
    _kind("internal", 500),
    _kind("engine_failed", 500, _ENGINE + "EngineFailed"),
    _kind("invalid_range_set", 500, _STORE + "InvalidRangeSet"),
    _kind("non_finite", 500),
    _kind("behind", 503, _STORE + "GenerationNotReached"),
    _kind("no_range_set", 503, _STORE + "NoRangeSet", exit_code=CONFLICT, retryable=False),
    _kind("store_unavailable", 503, _STORE + "StoreUnavailable"),
    _kind("draining", 503, _ENGINE + "Draining"),
    _kind("replica_lost", 503, _ENGINE + "ReplicaLost"),
    _kind("not_ready", 503),
    _kind("keys_unavailable", 503),
    _kind("too_many_bodies", 503),
    _kind("too_many_connections", 503),
    _kind("deadline_exceeded", 504, _ENGINE + "DeadlineExceeded"),
    _kind("not_everywhere", 504, client="ReplicasBehind"),
)

COMMAND_ERRORS: Final[Mapping[str, int]] = {
    "range_store.errors.InvalidKey": USAGE,
    "range_store.errors.InvalidStoreAddress": USAGE,
    "range_store.errors.RangeStoreError": CONFLICT,
    "app.http.server.AddressInvalid": USAGE,
    "app.http.server.ListenFailed": FAILED,
    "app.http.server.RequestsCutOff": FAILED,
    "app.http.server.StoppedAtOnce": INTERRUPTED,
    "app.observability.tracing.TracesUnavailable": USAGE,
    "workers.models.errors.ModelError": USAGE,
    "workers.corpora.errors.CorpusError": USAGE,
    "workers.evaluation.evaluate.EvaluationError": USAGE,
    "workers.cluster.errors.RayMissing": USAGE,
    "workers.cluster.errors.ClusterUnavailable": UNREACHABLE,
    "workers.cluster.errors.OtherFleet": CONFLICT,
    "workers.cluster.errors.ClusterError": FAILED,
    "workers.demo.minilm.DemoError": FAILED,
    "workers.engine.errors.EngineError": FAILED,
    "torch.OutOfMemoryError": FAILED,
    "typer.exceptions.Abort": INTERRUPTED,
    "builtins.OSError": FAILED,
    "builtins.KeyboardInterrupt": INTERRUPTED,
}
"""Exit codes of errors that only commands meet, and of base classes."""

KINDS: Final[Mapping[str, ErrorKind]] = {kind.code: kind for kind in ERRORS}
"""Every error that HTTP knows, by code."""

_CLASSES: Final = {name: kind for kind in ERRORS for name in kind.classes}
_EXIT_CODES: Final = {name: kind.exit_code for name, kind in _CLASSES.items()} | dict(COMMAND_ERRORS)


def kind_of(error: BaseException) -> ErrorKind | None:
    """The error's kind by the nearest class of its ancestry; None for one that HTTP does not know."""
    return _nearest(error, _CLASSES)


def exit_code_of(error: BaseException) -> int | None:
    """The exit code by the nearest class of the error's ancestry; None for one that only a bug can cause."""
    return _nearest(error, _EXIT_CODES)


def _nearest(error: BaseException, by_name: Mapping[str, T]) -> T | None:
    names = (f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__)
    return next((by_name[name] for name in names if name in by_name), None)
