"""The parts of the report as HTML. The markup is in `templates/`; Jinja escapes every text in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

PLOTLY = Path(__file__).parent / "plotly" / "plotly-basic.min.js"
"""Draws lines and bars; all of plotly.js would be four times as large."""
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
)


@dataclass
class Section:
    """A heading, one sentence that says what is seen, and the settings it was made with; then its parts."""

    title: str
    sentence: str
    settings: str
    parts: list[Markup] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """A cell with a small second line. kind: its CSS class."""

    text: str
    small: str = ""
    kind: str = ""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], mean_rows: Sequence[bool] = ()) -> Markup:
    """A table. Columns with anything but numbers align left. mean_rows: which rows stand out."""
    cells = [[value if isinstance(value, Cell) else Cell(str(value)) for value in row] for row in rows]
    is_text = [any(not _is_numeric(row[index].text) for row in cells) for index in range(len(columns))]
    classified = [
        [(cell, f"word {cell.kind}".strip() if word else cell.kind) for cell, word in zip(row, is_text, strict=True)]
        for row in cells
    ]
    return _render(
        "table.html",
        columns=list(zip(columns, is_text, strict=True)),
        rows=list(zip_longest(classified, mean_rows, fillvalue=False)),
    )


def shaded(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], hints: Sequence[Sequence[str]] = ()
) -> Markup:
    """A table of shares in [0, 1]: the larger, the darker. hints: tooltip of each share."""
    hints = hints or [[""] * len(columns)] * len(rows)
    cells = [
        (name, list(zip(shares, own_hints, strict=True))) for (name, shares), own_hints in zip(rows, hints, strict=True)
    ]
    return _render("shaded.html", columns=columns, rows=cells)


def figure(drawn: go.Figure) -> Markup:
    """A plotly figure as a part of the page."""
    html = drawn.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return Markup(f"<div class=figure>{html}</div>")


def folded(summary: str, content: Markup) -> Markup:
    """Content that opens on a click."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, content)


def preformatted(text: str) -> Markup:
    """Text with its line breaks and spaces."""
    return Markup("<pre>{}</pre>").format(text)


def page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. plotly.js is inside, so the page needs no network."""
    return _render("page.html", title=title, facts=facts, sections=sections, plotly=Markup(PLOTLY.read_text("utf-8")))


def _render(template: str, **values: Any) -> Markup:
    return Markup(_TEMPLATES.get_template(template).render(**values))


def _is_numeric(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return text.rstrip("%") in ("", "–")
    return True
