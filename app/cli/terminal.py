"""What people see: results on stdout, everything else on stderr. Off a terminal all of it is plain text."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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

from range_store.formatting import format_duration

Report = Callable[[str, int, int], None]
"""Told of progress: (what is being done, how much of it, out of how much; 0 where that is not known)."""

PLAIN_WIDTH = 100_000
"""Columns off a terminal: a table in a pipe or a file is never wrapped or cut."""
USUAL_WIDTH = 80
"""Columns of a terminal that nobody made wider."""
PLAIN_SECONDS = 10.0
"""Off a terminal, progress is one line per so many seconds."""


def stdout() -> Console:
    """For results."""
    return _console(Console(highlight=False))


def stderr() -> Console:
    """For progress, hints and errors."""
    return _console(Console(stderr=True, highlight=False))


def _console(console: Console) -> Console:
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def print_json(value: Any) -> None:
    """The one thing on stdout of a command with --json. NaN, which JSON has no word for, must be None by now."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _shown(text: object) -> str:
    """As a terminal may show it: names and reasons are others', and could turn its words around, or give it orders."""
    said = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escape(said)


def say(message: str) -> None:
    """A plain line on stdout; square brackets in it are just that, and what cannot be printed is written out."""
    stdout().print(_shown(message), soft_wrap=True)


def hint(message: str) -> None:
    """What to do next, on stderr."""
    stderr().print(_shown(message), style="dim", soft_wrap=True)


def error_line(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    stderr().print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, header: bool = True, spare: Sequence[str] = ()
) -> None:
    """A table on stdout. A column whose values are all numbers is aligned right.

    Args:
        spare: columns that are left out, the first one first, while the table is wider than the terminal, or without
            one than `USUAL_WIDTH`; stderr says which.
    """
    console = stdout()
    filled = [index for index in range(len(columns)) if any(str(row[index]) for row in rows)]
    left_out = []
    for name in (name for name in spare if columns.index(name) in filled):
        if _width(columns, rows, filled) <= (console.width if console.is_terminal else USUAL_WIDTH):
            break
        filled.remove(columns.index(name))
        left_out.append(name)
    drawn = Table(
        show_header=header,
        header_style="bold",
        box=None,
        pad_edge=False,
        show_edge=False,
    )
    for place, index in enumerate(filled):
        numbers = all(_is_number(str(row[index])) for row in rows)
        drawn.add_column(columns[index], justify="right" if numbers else "left", overflow="fold", no_wrap=not place)
    for row in rows:
        drawn.add_row(*(_shown(row[index]) for index in filled))
    if console.is_terminal:
        console.print(drawn)
    else:
        with console.capture() as captured:
            console.print(drawn)
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
    if left_out:
        hint(f"left out to fit the width: {', '.join(left_out)}; --json gives everything")


def _width(columns: Sequence[str], rows: Sequence[Sequence[object]], shown: Sequence[int]) -> int:
    """Columns of a terminal that a table takes, with two between any two of its own."""
    widest = [max(cell_len(text) for text in (columns[i], *(str(row[i]) for row in rows))) for i in shown]
    return sum(widest) + 2 * (len(widest) - 1)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value == "–"
    return True


@contextmanager
def progress(unit: str) -> Iterator[Report]:
    """Progress on stderr with rate and time left: bars on a terminal, else a line now and then.

    Args:
        unit: what is counted: "rows", "steps"; empty if that differs.
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
                # what an earlier run had done must not count as speed
                tasks[what] = bars.add_task(escape(what), total=total or None, completed=done)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


class _CountColumn(ProgressColumn):
    """How much of how much, and how fast."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        if task.total is None or task.total == 1:  # a step, not a count
            return Text("")
        speed = task.finished_speed or task.speed
        count = _count(int(task.completed), int(task.total), "" if speed else self._unit)
        return Text(f"{count} · {_rate(speed, self._unit)}" if speed else count, style="progress.download")


class _PlainProgress:
    """Progress where nobody looks at a terminal: a log, a pipe."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._what: str | None = None
        self._started = self._said = 0.0
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._said, self._first = what, now, now, done
            self._say(what if done < total or not total else f"{what}: {_count(done, total, self._unit)}")
        elif done >= total > 0 or now - self._said >= PLAIN_SECONDS:
            self._said = now
            speed = (done - self._first) / max(now - self._started, 1e-9)
            left = f", {format_duration((total - done) / speed)} left" if speed and done < total else ""
            self._say(f"{what}: {_count(done, total, self._unit)}, {_rate(speed, self._unit)}{left}")

    def _say(self, line: str) -> None:
        self._console.print(escape(line), soft_wrap=True)


def _count(done: int, total: int, unit: str) -> str:
    return f"{done:,}/{total:,} {unit}".rstrip()


def _rate(speed: float, unit: str) -> str:
    number = f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
    return f"{number} {unit}/s" if unit else f"{number}/s"
