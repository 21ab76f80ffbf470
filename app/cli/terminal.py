"""Output of commands: results on stdout; progress, hints and commands to run next on stderr.

Without a terminal, all of it is plain text.
"""

import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from app.cli.options import MODEL
from app.cli.parsing import SECONDS
from app.errors import INTERRUPTED
from app.serving.inputs import OnProgress
from app.settings import Settings, default_data_dir
from range_store.formatting import format_duration

PIPE_WIDTH = 100_000
"""Width without a terminal: a table in a pipe or a file is not wrapped or cut."""
DEFAULT_WIDTH = 80
"""Width that tables are fitted to without a terminal."""
PLAIN_INTERVAL = 10.0
"""Seconds between two lines of progress without a terminal."""


def stdout() -> Console:
    """The console for results."""
    return _with_width(Console(highlight=False))


def stderr() -> Console:
    """The console for progress, hints and errors."""
    return _with_width(Console(stderr=True, highlight=False))


def _with_width(console: Console) -> Console:
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def print_json(value: Any) -> None:
    """Print the result of a command with --json. Raises ValueError for NaN, which JSON does not have."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _safe(text: object) -> str:
    """The text with unprintable characters and markup escaped: in a name they could control the terminal."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)))


def say(message: str) -> None:
    """Print a line on stdout."""
    stdout().print(_safe(message), soft_wrap=True)


def hint(message: str) -> None:
    """Print a line on stderr, such as what to do next."""
    stderr().print(_safe(message), style="dim", soft_wrap=True)


def error_line(message: str) -> None:
    """Print an error on stderr, always as one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    stderr().print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def moment(unix: float, *, seconds: bool = False) -> str:
    """A Unix time in the local time zone."""
    return datetime.fromtimestamp(unix).astimezone().strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def until(unix: float) -> str:
    """The time from now to a Unix time: "in 14m"."""
    seconds = unix - time.time()
    if seconds <= 0:
        return "expired"
    for unit in ("d", "h", "m"):
        if seconds >= SECONDS[unit] - 1:
            return f"in {seconds / SECONDS[unit]:.0f}{unit}"
    return f"in {seconds:.0f}s"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, header: bool = True, spare: Sequence[str] = ()
) -> None:
    """Print a table on stdout, without empty columns. Columns of numbers are aligned right.

    Args:
        spare: columns to leave out, the first one first, while the table is wider than the terminal or
            `DEFAULT_WIDTH`; a line on stderr lists them.
    """
    console = stdout()
    filled = [index for index in range(len(columns)) if any(str(row[index]) for row in rows)]
    left_out = []
    for name in (name for name in spare if columns.index(name) in filled):
        if _width(columns, rows, filled) <= (console.width if console.is_terminal else DEFAULT_WIDTH):
            break
        filled.remove(columns.index(name))
        left_out.append(name)
    drawn = Table(show_header=header, header_style="bold", box=None, pad_edge=False, show_edge=False)
    for place, index in enumerate(filled):
        numbers = all(_is_number(str(row[index])) for row in rows)
        drawn.add_column(columns[index], justify="right" if numbers else "left", overflow="fold", no_wrap=not place)
    for row in rows:
        drawn.add_row(*(_safe(row[index]) for index in filled))
    if console.is_terminal:
        console.print(drawn)
    else:
        with console.capture() as captured:
            console.print(drawn)
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
    if left_out:
        hint(f"left out to fit the width: {', '.join(left_out)}; --json gives everything")


def _width(columns: Sequence[str], rows: Sequence[Sequence[object]], indices: Sequence[int]) -> int:
    """Width of a table of these columns, with two spaces between them."""
    widest = [max(cell_len(text) for text in (columns[i], *(str(row[i]) for row in rows))) for i in indices]
    return sum(widest) + 2 * (len(widest) - 1)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value == "–"
    return True


@contextmanager
def progress(unit: str) -> Iterator[OnProgress]:
    """Show progress on stderr with rate and remaining time: bars on a terminal, else a line every few seconds.

    Args:
        unit: the format_count items, like "rows"; empty if they differ from step to step.
    """
    console = stderr()
    if not console.is_terminal:
        yield _PlainProgress(console, unit)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        _CountColumn(unit),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, total=bars.tasks[earlier].total or 1, completed=bars.tasks[earlier].total or 1)
                # items of an earlier run must not count as speed
                tasks[what] = bars.add_task(escape(what), total=total or None, completed=done)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


@contextmanager
def resumable() -> Iterator[None]:
    """Ends an interrupted command that saves checkpoints with a hint."""
    try:
        yield
    except KeyboardInterrupt:
        hint("interrupted: the same command resumes from the last checkpoint")
        raise typer.Exit(INTERRUPTED) from None


class _CountColumn(ProgressColumn):
    """Finished items, total and rate."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        if task.total is None or task.total == 1:  # a step without items
            return Text("")
        speed = task.finished_speed or task.speed
        count = _count(int(task.completed), int(task.total), "" if speed else self._unit)
        return Text(f"{count} · {_rate(speed, self._unit)}" if speed else count, style="progress.download")


class _PlainProgress:
    """Progress as plain lines, for a log or a pipe."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._what: str | None = None
        self._started = self._printed = 0.0
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._printed, self._first = what, now, now, done
            self._print(what if done < total or not total else f"{what}: {_count(done, total, self._unit)}")
        elif done >= total > 0 or now - self._printed >= PLAIN_INTERVAL:
            self._printed = now
            speed = (done - self._first) / max(now - self._started, 1e-9)
            left = f", {format_duration((total - done) / speed)} left" if speed and done < total else ""
            self._print(f"{what}: {_count(done, total, self._unit)}, {_rate(speed, self._unit)}{left}")

    def _print(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)


def _count(done: int, total: int, unit: str) -> str:
    return f"{done:,}/{total:,} {unit}".rstrip()


def _rate(speed: float, unit: str) -> str:
    number = f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
    return f"{number} {unit}/s" if unit else f"{number}/s"


def command(*words: str, **options: object) -> str:
    """A `neuronlens` command, as a shell accepts it.

    Options that are None or False are left out, and so is a password in a URL, which the user has to add.
    """
    parts = ["neuronlens", *words]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            written = _without_password(str(value)) if name.endswith("url") else str(value)
            parts += [f"{flag}={written}"] if written.startswith("-") else [flag, written]
    return shlex.join(parts)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    if not colon:
        return url
    return urlunsplit(parts._replace(netloc=f"{name}@{host}" if name else host))


def keys_create_command(settings: Settings) -> str:
    """The command that creates an API key in the settings' store."""
    return command("keys", "create", "NAME", scope="infer", **store_options(settings))


def fit_command(settings: Settings, source: str, name: str) -> str:
    """The command that fits and activates a range set for a served model."""
    loading = model_options(settings) if source == settings.model else {}
    loading["name"] = None if name == Path(source).name else name
    return command("fit", model=source, **loading, data="FILE", activate=True, **store_options(settings))


def model_options(settings: Settings) -> dict[str, object]:
    """The options with which another command loads the same model."""
    chosen = {name: getattr(settings, name) for name in MODEL}
    return {name: value for name, value in chosen.items() if value != Settings.model_fields[name].default}


def store_options(settings: Settings) -> dict[str, object]:
    """The options with which another command uses the same store, if it is not the default one."""
    if settings.redis_url is not None:
        same = settings.redis_url == os.environ.get("NEURONLENS_REDIS_URL")
        return {"redis_url": None if same else settings.redis_url}
    return {"data_dir": None if settings.data_dir == default_data_dir() else settings.data_dir}
