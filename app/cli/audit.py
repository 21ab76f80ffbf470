"""`neuronlens audit`: who changed what is live, and when."""

from typing import Annotated

import typer

from app.cli import options
from app.cli.clock import moment
from app.cli.control import control_of
from app.cli.terminal import hint, print_json, table
from range_store.domain.live import AuditEntry


def audit(
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Most entries.")] = 20,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """List the last changes of live erasures and of the active range set, newest first."""
    with control_of(url, redis_url, data_dir, name) as control:
        entries = control.audit(limit)
    if as_json:
        print_json([each.model_dump(mode="json") for each in entries])
    elif not entries:
        hint("nothing was ever changed")
    else:
        columns = ("when", "who", "what", "concepts", "before", "after", "reason")
        table(columns, [_row(each) for each in entries], spare=("before",))


def _row(entry: AuditEntry) -> tuple[object, ...]:
    concepts = [*entry.concepts, *(f"{concept} (dropped)" for concept in entry.dropped)]
    what = f"{entry.action} {entry.range_set}" if entry.action == "activate" else entry.action
    return (
        moment(entry.at, seconds=True),
        entry.by or "",
        what,
        ", ".join(concepts),
        entry.before or "",
        entry.after,
        entry.reason or "",
    )
