"""Logs: each record is one line, as JSON or to read, and names the request and the generation that it belongs to.

No text of a user and no secret gets into them: of a record only the known `FIELDS` are taken, and of an exception its
type and where it was raised, since its message may quote the text that caused it.
"""

import contextvars
import io
import logging
import os
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

import typer
from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger(__name__)

OURS = ("app", "workers", "range_store")
"""Loggers that follow `log_level`. Others log from `warning` on: at debug they quote the data that they handle."""
SILENT = ("opentelemetry", "urllib3", "requests")
"""Loggers that quote headers and addresses, which may hold secrets; `app.observability.tracing` logs in their place."""

FIELDS: Mapping[str, str] = {
    "timestamp": "when, in UTC (RFC 3339)",
    "level": "`debug`, `info`, `warning`, `error` or `critical`",
    "logger": "the module that speaks; `stderr`: what a library wrote there by itself, and hints of the command line",
    "message": "what happened",
    "request_id": "the request that was served: the `X-Request-ID` of its reply",
    "trace_id": "its trace, if the caller sent a `traceparent` or traces are exported",
    "span_id": "the span within the trace; without exported traces: the caller's",
    "generation": "generation of the live state: the one that the answer used, or that was in force",
    "model": "name of the served model",
    "replica": "of a fleet: the replica that speaks or, in a line of its ingress, the one that answered",
    "method": "HTTP method, or `other`",
    "route": "template of the path, never the path; `unmatched` if there is none",
    "status": "HTTP status; 499: the client hung up",
    "seconds": "how long the request took",
    "texts": "texts of the request",
    "key": "name of the API key",
    "client": "address of the caller, or of the last proxy that is not trusted",
    "exception": "an error: `type`, `frames`, `reason` if the system gave one, `cause`; never what it says",
}
"""Every field that a line can have, with its meaning. `docs/observing.md` lists them; a test holds it against this."""


class LogSettings(Protocol):
    """The settings of logs."""

    @property
    def log_level(self) -> str: ...

    @property
    def log_format(self) -> str: ...


@dataclass
class RequestFacts:
    """What is known of the current request; filled in while it is served."""

    request_id: str | None
    generation: str | None = None
    model: str | None = None
    texts: int | None = None
    key: str | None = None
    replica: str | None = None


_request: contextvars.ContextVar[RequestFacts | None] = contextvars.ContextVar("neuronlens_request", default=None)
_always: dict[str, str] = {}
"""Fields of every line of this process, by name."""


def current_request() -> RequestFacts | None:
    """The facts of the current request, if there is one."""
    return _request.get()


def begin(facts: RequestFacts) -> None:
    """Attribute what this task logs from here on to a request."""
    _request.set(facts)


def note(**facts: Any) -> None:
    """Set facts of the current request, if there is one."""
    if (request := _request.get()) is not None:
        for name, value in facts.items():
            setattr(request, name, value)


def described(error: BaseException, depth: int = 5) -> dict[str, Any]:
    """The field `exception`: types and frames of an error and of its causes, without their messages."""
    frames = traceback.extract_tb(error.__traceback__)
    fields: dict[str, Any] = {
        "type": f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins."),
        "frames": [f"{each.filename}:{each.lineno} in {each.name}: {each.line}" for each in frames],
    }
    if isinstance(error, OSError) and error.strerror:
        fields["reason"] = os.strerror(error.errno) if error.errno else ""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth:
        fields["cause"] = described(cause, depth - 1)
    return fields


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The known fields of a record that have a value, in the order of `FIELDS`."""
    request = _request.get()
    span = trace.get_current_span().get_span_context()
    own: dict[str, Any] = {
        "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": _message(record),
        "request_id": request and request.request_id,
        "trace_id": trace.format_trace_id(span.trace_id) if span.is_valid else None,
        "span_id": trace.format_span_id(span.span_id) if span.is_valid else None,
        "generation": request and request.generation,
        "model": request and request.model,
        "replica": request and request.replica,
    }
    own |= {name: value for name, value in _always.items() if own.get(name) is None}
    if record.exc_info and record.exc_info[1] is not None:
        own["exception"] = described(record.exc_info[1])
    ours = record.name.partition(".")[0] in OURS  # other loggers may attach anything
    given = {name: getattr(record, name) for name in FIELDS if name not in _RESERVED and hasattr(record, name)}
    merged = own | given if ours else own
    return {name: merged[name] for name in FIELDS if merged.get(name) is not None}


_RESERVED = frozenset({"timestamp", "level", "logger", "message"})


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except Exception:
        message = str(record.msg)  # its arguments do not fit
    if record.name == "asyncio" and record.levelno >= logging.WARNING:
        # "Task exception was never retrieved", and then the task with its arguments, and the error's message
        end = next((at for at, c in enumerate(message) if not (c.isalpha() or c in " '-")), None)
        return message[:end].strip()
    return message


class JsonLines(JsonFormatter):
    """A record as a JSON object on one line, in ASCII, so that no value can end the line."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data.update(fields_of(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return ""  # it is a field already


class TextLines(logging.Formatter):
    """A record as a line to read, with the frames of an error indented below it."""

    COLOURS: Mapping[str, str] = {"debug": "bright_black", "warning": "yellow", "error": "red", "critical": "red"}

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        level, message = fields["level"], _printable(fields["message"])
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        shown = ("timestamp", "level", "logger", "message", "exception")
        rest = " ".join(f"{name}={_printable(str(value))}" for name, value in fields.items() if name not in shown)
        head = (self._styled(at, "bright_black"), self._styled(f"{level:<8}", self.COLOURS.get(level)))
        line = f"{head[0]} {head[1]} {_printable(fields['logger'])}: {message}"
        lines = [f"{line}  {self._styled(rest, 'bright_black')}" if rest else line]
        error = fields.get("exception")
        while error:
            lines += [f"    {_printable(each)}" for each in error["frames"]]
            lines.append(f"  {' '.join(_printable(error[name]) for name in ('type', 'reason') if error.get(name))}")
            error = error.get("cause")
        return "\n".join(lines)

    def _styled(self, words: str, colour: str | None) -> str:
        return typer.style(words, fg=colour) if self._colour and colour else words


def _printable(words: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in words)


class _Lines(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing: the default one prints the record's arguments."""


class _StderrLines(io.TextIOBase):
    """A replacement of stderr that makes log lines of what is written to it."""

    def __init__(self, real: TextIO) -> None:
        self._real: TextIO | None = real
        self._writing = threading.RLock()
        self._begun = ""
        self._log = logging.getLogger("stderr")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return (self._real or sys.__stderr__ or sys.stderr).fileno()

    def write(self, words: str, /) -> int:
        if self._real is None:  # a library kept it after the server stopped
            return sys.stderr.write(words)
        with self._writing:
            *whole, self._begun = (self._begun + words).replace("\r", "\n").split("\n")
        for line in whole:
            if line.strip():
                self._log.info("%s", line.strip())
        return len(words)

    def end(self) -> None:
        if self._begun:
            self.write("\n")
        self._real = None


@contextmanager
def configured(settings: LogSettings, **always: str) -> Iterator[None]:
    """Log to stderr in the format of the settings, inside the context.

    In JSON, what other code writes to `sys.stderr` is logged too; what C libraries write to its descriptor is not.

    Args:
        always: fields of every line that does not have them itself.
    """
    real = sys.stderr
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not real.isatty())
    handler = _Lines(real)
    handler.setFormatter(JsonLines() if as_json else TextLines(colour=real.isatty() and not os.environ.get("NO_COLOR")))
    with ExitStack() as undo:
        undo.callback(_always.update, dict(_always))
        undo.callback(_always.clear)
        _always.update(always)
        root = logging.getLogger()
        undo.callback(setattr, root, "handlers", root.handlers)
        root.handlers = [handler]
        level = settings.log_level.upper()
        uvicorn = "INFO" if settings.log_level == "debug" else "WARNING"
        for name in SILENT:  # not undone: their threads may outlive the context
            logging.getLogger(name).setLevel("CRITICAL")
        levels = dict.fromkeys(OURS, level) | {"uvicorn": uvicorn}
        # app.observability.requests logs requests, without their paths
        levels |= {"uvicorn.access": "CRITICAL", "huggingface_hub": "ERROR", "stderr": "INFO"}
        for name, wanted in ({"": "WARNING"} | levels).items():
            each = logging.getLogger(name)
            undo.callback(each.setLevel, each.level)
            each.setLevel(wanted)
        undo.enter_context(_hooked())
        if as_json:
            stray = _StderrLines(real)
            sys.stderr = stray
            undo.callback(setattr, sys, "stderr", real)
            undo.callback(stray.end)
        yield


@contextmanager
def _hooked() -> Iterator[None]:
    """Log what Python would print by itself: warnings and uncaught errors."""

    def uncaught(kind: type[BaseException], error: BaseException, _: types.TracebackType | None) -> None:
        logger.critical("uncaught error: %s", kind.__name__, exc_info=error)

    def uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        logger.critical("uncaught error in thread %s: %s", name, args.exc_type.__name__, exc_info=args.exc_value)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        logger.error("ignored error: %s", args.exc_type.__name__, exc_info=args.exc_value)

    def warned(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        said = f": {message}" if _request.get() is None and threading.current_thread().name != "engine" else ""
        logging.getLogger("py.warnings").warning("%s at %s:%d%s", category.__name__, filename, lineno, said)

    before = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, uncaught_in_thread, unraisable
    warnings.showwarning = warned
    try:
        yield
    finally:
        sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning = before
