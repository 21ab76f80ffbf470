"""The form and content of log lines, and of everything else that is written to stderr."""

import asyncio
import gc
import io
import json
import logging
import os
import pty
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli import run
from app.observability.logs import FIELDS, JsonLines, RequestFacts, TextLines, begin, configured, note
from app.settings import Settings

SECRET = "a text that no log may contain"
HOSTILE = st.text(st.characters(), max_size=60) | st.sampled_from(
    ['\n{"level": "error"}', "\r\n2026-01-01 00:00:00 error    app: forged", "\x1b[31m", "\u2028", "\ud800", '"', "%s"]
)


def record(name: str, message: str, extra: dict[str, Any], error: BaseException | None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.getLogger(name).makeRecord(name, logging.ERROR, "file.py", 1, message, (), info, extra=extra)


def raised(message: str) -> Exception:
    try:
        try:
            raise ValueError(message)
        except ValueError as cause:
            raise OSError(2, message) from cause
    except OSError as error:
        return error


@given(name=st.sampled_from(["app.x", "somebody"]), message=HOSTILE, value=HOSTILE, failed=st.booleans())
def test_a_record_is_one_json_object_on_one_line(name: str, message: str, value: str, failed: bool) -> None:
    made = record(name, message, {"route": value, "payload": SECRET}, raised(SECRET) if failed else None)
    line = JsonLines().format(made)
    assert line.isascii()
    assert line.isprintable()
    fields = json.loads(line)
    assert list(fields) == [field for field in FIELDS if field in fields]
    assert fields["message"] == message
    assert fields.get("route") == (value if name == "app.x" else None)
    assert SECRET not in line
    assert datetime.fromisoformat(fields["timestamp"]).utcoffset() == timedelta(0)
    if failed:
        assert (fields["exception"]["type"], fields["exception"]["cause"]["type"]) == (
            "FileNotFoundError",
            "ValueError",
        )
        assert fields["exception"]["reason"] == os.strerror(2)


@given(message=HOSTILE, value=HOSTILE, failed=st.booleans())
def test_a_text_record_cannot_forge_another_one(message: str, value: str, failed: bool) -> None:
    made = record("app.x", message, {"route": value}, raised(message) if failed else None)
    first, *more = TextLines(colour=False).format(made).split("\n")
    assert first.isprintable()
    assert first[20:].startswith("error    app.x: ")
    assert all(line.startswith("  ") and line.isprintable() for line in more)
    assert bool(more) is failed


@contextmanager
def stderr_lines(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[list[str]]:
    """The lines written to stderr while logs are configured."""
    stream, lines = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", stream)
    with configured(Settings(**settings)):
        yield lines
    assert sys.stderr is stream
    lines += stream.getvalue().splitlines()


@pytest.mark.filterwarnings("default")
def test_everything_on_stderr_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError(SECRET)

    before = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
    with stderr_lines(monkeypatch) as lines:
        sys.stderr.write("a library's\rprogress\n")
        sys.stderr.write("no end of line")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("app.x").error("%d", SECRET)  # the arguments do not fit
        logging.getLogger("somebody").error("text %s", object())
        logging.getLogger("app.x").error("unprintable", extra={"route": object()})
        thread = threading.Thread(target=fail, name="worker")
        thread.start()
        thread.join()
        try:
            fail()
        except ValueError as error:
            sys.excepthook(ValueError, error, error.__traceback__)
        asyncio.run(task_with_unread_error(fail))
    records = [json.loads(line) for line in lines]
    messages = [each["message"] for each in records]
    assert messages[:2] == ["a library's", "progress"]
    assert messages[-1] == "no end of line"
    assert sum("DeprecationWarning" in each for each in messages) == 1
    assert "uncaught error in thread worker: ValueError" in messages
    assert "uncaught error: ValueError" in messages
    assert "Task exception was never retrieved" in messages
    assert SECRET not in "".join(lines)
    assert before == (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)


async def task_with_unread_error(fail: Any) -> None:
    async def work(message: str) -> None:
        raise ValueError(message)

    task = asyncio.create_task(work(SECRET))
    await asyncio.wait([task])
    del task
    gc.collect()


def test_debug_logs_are_those_of_this_package_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with stderr_lines(monkeypatch, log_level="debug") as lines:
        for name in ("redis", "httpx", "urllib3.connectionpool", "uvicorn.access", "opentelemetry.exporter", "asyncio"):
            logging.getLogger(name).debug(SECRET)
            logging.getLogger(name).info(SECRET)
        for name in ("app.x", "workers.x", "range_store.x"):
            logging.getLogger(name).debug("ours")
    assert [json.loads(line)["logger"] for line in lines] == ["app.x", "workers.x", "range_store.x"]


def test_log_lines_of_other_threads_name_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("app.x")

    async def serve(request_id: str) -> None:
        begin(RequestFacts(request_id, "epoch-1"))
        log.warning("begins")
        await asyncio.to_thread(note, generation="epoch-2")
        await asyncio.to_thread(log.warning, "on a thread")

    async def two() -> None:
        await asyncio.gather(serve("a"), serve("b"))
        log.warning("alone")

    with stderr_lines(monkeypatch) as lines:
        asyncio.run(two())
    records = [json.loads(line) for line in lines]
    for request_id in ("a", "b"):
        own = [(each["message"], each["generation"]) for each in records if each.get("request_id") == request_id]
        assert own == [("begins", "epoch-1"), ("on a thread", "epoch-2")]
    assert "request_id" not in records[-1]


@pytest.mark.parametrize(("settings", "coloured"), [({}, True), ({"log_format": "json"}, False)])
def test_a_terminal_gets_text_lines(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], coloured: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with configured(Settings(**settings)):
            logging.getLogger("app.x").warning("it happens")
            assert sys.stderr.isatty() is coloured  # progress bars would break JSON lines
    written = os.read(ours, 4096).decode()
    os.close(ours)
    assert "it happens" in written
    assert ("\x1b[" in written) is coloured
    assert written.startswith("{") is not coloured


def test_an_unexpected_error_is_one_log_line_and_one_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr("app.serving.serve.open_service", broken)
    (tmp_path / "config.json").touch()
    code = run(["serve", "--model", str(tmp_path), "--port", "0", "--data-dir", str(tmp_path)])
    *lines, last = capsys.readouterr().err.splitlines()
    assert code == 1
    assert last.startswith("error: internal error (ZeroDivisionError)")
    records = [json.loads(line) for line in lines]
    assert records[-1]["level"] == "critical"
    assert any("in broken" in frame for frame in records[-1]["exception"]["frames"])
    assert SECRET not in "".join([*lines, last])
