"""One self-contained HTML page: sections with a heading, a sentence, the settings, and a table or a figure each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import plotly.graph_objects as go

PLOTLY = Path(__file__).parent / "plotly" / "plotly-basic.min.js"
"""Draws lines and bars; all of plotly.js would be four times as large."""

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --dim: #66707f; --line: #dde2e8; --tint: #f4f6f8 }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0; padding: 1.5rem }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem;
border-top: 1px solid var(--line); padding-top: 1rem } p { margin: .3rem 0; max-width: 78ch }
.settings { color: var(--dim); font-size: .86rem }
.figure { max-width: 1200px; margin: .7rem 0 }
.scroll { overflow-x: auto; margin: .7rem 0 } table { border-collapse: collapse; font-size: .88rem;
font-variant-numeric: tabular-nums } th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap;
border-bottom: 1px solid var(--line) } th { background: var(--tint); font-weight: 600 }
td.word, th.word { text-align: left }
td.long { white-space: normal; text-align: left; min-width: 17rem } tr.mean td { font-weight: 600 }
td small { color: var(--dim); display: block; font-size: .76rem } nav { columns: 2; font-size: .9rem; margin: 1rem 0;
max-width: 1200px }
nav a { color: inherit; display: block } details { margin: .5rem 0 } summary { cursor: pointer; color: var(--dim) }
.yes { color: #1c7a43 } .no { color: #b03030 }
pre { background: var(--tint); padding: .8rem; overflow-x: auto; font-size: .8rem }
@media (max-width: 700px) { nav { columns: 1 } body { padding: .8rem } }
"""


@dataclass
class Section:
    """A heading, one sentence that says what is seen, and the settings it was made with; then its parts, as HTML."""

    title: str
    sentence: str
    settings: str
    parts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """A cell with a small second line."""

    text: str
    small: str = ""
    kind: str = ""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], mean_rows: Sequence[bool] = ()) -> str:
    """A table; everything is escaped. Columns without a number align left. mean_rows: which rows stand out."""
    words = [any(not _numeric(row[index]) for row in rows) for index in range(len(columns))]
    head = "".join(
        f"<th{' class=word' if word else ''}>{escape(name)}</th>" for name, word in zip(columns, words, strict=True)
    )
    body = []
    for number, row in enumerate(rows):
        cells = "".join(_cell(value, word) for value, word in zip(row, words, strict=True))
        body.append(f"<tr{' class=mean' if mean_rows and mean_rows[number] else ''}>{cells}</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _cell(value: object, word: bool) -> str:
    cell = value if isinstance(value, Cell) else Cell(str(value))
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    kinds = " ".join(filter(None, ("word" if word else "", cell.kind)))
    attribute = f' class="{escape(kinds)}"' if kinds else ""
    return f"<td{attribute}>{escape(cell.text)}{small}</td>"


def _numeric(value: object) -> bool:
    text = (value.text if isinstance(value, Cell) else str(value)).rstrip("%")
    try:
        float(text)
    except ValueError:
        return text in ("", "–")
    return True


def figure(drawn: go.Figure) -> str:
    """A plotly figure as a part of the page."""
    html: str = drawn.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return f"<div class=figure>{html}</div>"


def shaded(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], hints: Sequence[Sequence[str]] = ()
) -> str:
    """A table of shares in [0, 1], the larger the darker. hints: what to show when a share is pointed at."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = []
    for number, (name, shares) in enumerate(rows):
        cells = []
        for place, share in enumerate(shares):
            hint = f' title="{escape(hints[number][place])}"' if hints else ""
            ink = "; color: white" if share > 0.6 else ""
            shade = f"background: rgba(8, 48, 107, {share:.3f}){ink}"
            cells.append(f'<td style="{shade}"{hint}>{share:.2f}</td>')
        body.append(f"<tr><th class=word>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page, plotly inside: it needs no network."""
    contents = "".join(f'<a href="#s{n}">{escape(each.title)}</a>' for n, each in enumerate(sections))
    body = "".join(
        f'<section><h2 id="s{n}">{escape(each.title)}</h2><p>{escape(each.sentence)}</p>'
        f"<p class=settings>{escape(each.settings)}</p>{''.join(each.parts)}</section>"
        for n, each in enumerate(sections)
    )
    plotly = PLOTLY.read_text("utf-8")
    said = "".join(f"<p class=settings>{escape(fact)}</p>" for fact in facts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<script>{plotly}</script></head><body><h1>{escape(title)}</h1>{said}<nav>{contents}</nav>{body}</body></html>\n"
    )
