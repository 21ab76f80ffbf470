"""`neuronlens erase`: the live erasures, which apply to requests that name none; and `neuronlens audit`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from app.cli import options, parsing
from app.cli.control import ControlOptions
from app.cli.exits import EPILOG, CommandError
from app.cli.terminal import hint, moment, print_json, say, table, until
from app.errors import USAGE
from range_store.domain.erasure import Damp, Erasure, Ranking, Replacement
from range_store.domain.live import AuditEntry, LiveErasure, LiveState

app = typer.Typer(
    help="Live erasures: erase concepts from answers while the server runs.", epilog=EPILOG, no_args_is_help=True
)


@dataclass(frozen=True)
class ChangeOptions(ControlOptions):
    """Options of a change to the live erasures."""

    reason: Annotated[str | None, typer.Option("--reason", help="Reason for the audit.")] = None
    if_match: options.IfMatch = None
    wait: Annotated[
        Literal["all"] | None,
        typer.Option(
            "--wait",
            help="all: wait until all running replicas apply the change. Otherwise exit 3 and list the others.",
        ),
    ] = None
    wait_seconds: Annotated[float, typer.Option("--wait-seconds", min=0.001, help="Maximum time to wait for them.")] = (
        5.0
    )

    @property
    def wait_limit(self) -> float | None:
        """Seconds to wait; None: do not wait."""
        return self.wait_seconds if self.wait else None


@app.command("list", epilog=EPILOG)
@options.expand
def list_(target: ControlOptions, as_json: options.AsJson = False) -> None:
    """List the live erasures."""
    with target.open() as control:
        state = control.live()
    _print(state, as_json)


@app.command(epilog=EPILOG)
@options.expand
def on(
    concept: Annotated[str, typer.Argument(metavar="CONCEPT", help="A concept of the active range set.")],
    *,
    method: Annotated[
        Literal["range", "neuron"], typer.Option("--method", help="Mask neurons only within their ranges, or always.")
    ] = "range",
    tau: Annotated[
        float, typer.Option("--tau", min=0.0, help="Half-width of the ranges in standard deviations.")
    ] = 2.5,
    top_fraction: Annotated[str, typer.Option("--top-fraction", help="Share of the neurons, in (0, 1].")] = "0.3",
    ranking: Annotated[Ranking, typer.Option("--ranking", help="Ranking of the neurons.")] = "max",
    layer: options.Layer = "-1",
    replacement: Annotated[
        str, typer.Option("--replacement", help="Value of masked neurons: zero, mean or damp:FACTOR.")
    ] = "zero",
    enforced: Annotated[
        bool, typer.Option("--enforced", help="Apply it to every request, even if the request names other erasures.")
    ] = False,
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Remove it after this time: seconds, or 15m, 2h, 1d.")
    ] = None,
    change: ChangeOptions,
    as_json: options.AsJson = False,
) -> None:
    """Erase a concept from all answers, or change how it is erased. Applies from the next request on."""
    fractions = parsing.fractions(top_fraction)
    if len(fractions) > 1:
        raise typer.BadParameter("expected one share, not several", param_hint="--top-fraction")
    layers = parsing.layers(layer)
    replace = parsing.replacement(replacement)
    seconds = parsing.duration(expires_in) if expires_in else None
    try:
        erasure = Erasure(
            concept=concept,
            method=method,
            tau=parsing.taus(str(tau))[0],
            top_fraction=fractions[0],
            ranking=ranking,
            layers=layers,
            replacement=replace,
        )
        live = LiveErasure(erasure=erasure, enforced=enforced, reason=change.reason)
    except ValidationError as error:
        raise CommandError(error.errors()[0]["msg"].removeprefix("Value error, "), USAGE) from None
    with change.open(wait=change.wait_limit) as control:
        state = control.switch_on(live, expires_in=seconds, if_match=change.if_match)
    _print(state, as_json, f"erasing {concept!r}")


@app.command(epilog=EPILOG)
@options.expand
def off(
    change: ChangeOptions,
    concept: Annotated[str | None, typer.Argument(metavar="CONCEPT", help="A concept that is erased.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Stop all erasures in one step.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Stop erasing a concept."""
    if (concept is None) != everything:
        raise typer.BadParameter("pass either a concept or --all", param_hint="CONCEPT")
    with change.open(wait=change.wait_limit) as control:
        erased = {each.concept for each in control.live().erasures}
        if concept is None:
            state = control.switch_all_off(reason=change.reason, if_match=change.if_match)
        else:
            state = control.switch_off(concept, reason=change.reason, if_match=change.if_match)
    if concept is None:
        done = "erasing nothing" + ("" if erased else ", as before")
    else:
        done = f"no longer erasing {concept!r}" if concept in erased else f"{concept!r} was not erased: nothing changed"
    _print(state, as_json, done)


@options.expand
def audit(
    target: ControlOptions,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Maximum number of entries.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """List the last changes of live erasures and of the active range set, newest first."""
    with target.open() as control:
        entries = control.audit(limit)
    if as_json:
        print_json([each.model_dump(mode="json") for each in entries])
    elif not entries:
        hint("there are no changes")
    else:
        columns = ("when", "who", "what", "concepts", "before", "after", "reason")
        table(columns, [_audit_row(each) for each in entries], spare=("before",))


def _audit_row(entry: AuditEntry) -> tuple[object, ...]:
    concepts = [*entry.concepts, *(f"{concept} (dropped)" for concept in entry.dropped)]
    return (
        moment(entry.at, seconds=True),
        entry.by or "",
        f"{entry.action} {entry.range_set}" if entry.action == "activate" else entry.action,
        ", ".join(concepts),
        entry.before or "",
        entry.after,
        entry.reason or "",
    )


def _print(state: LiveState, as_json: bool, headline: str = "") -> None:
    if as_json:
        found = [_as_json(each) for each in state.erasures]
        print_json({"generation": state.generation, "range_set": state.range_set, "erasures": found})
        return
    say(f"{headline + ', ' if headline else ''}generation {state.generation}")
    if not state.erasures:
        say("nothing is erased" if state.range_set else "no range set is active: nothing can be erased")
        return
    columns = ("concept", "method", "τ", "top", "ranking", "layers", "replacement", "enforced", "expires", "reason")
    table(columns, [_row(each) for each in state.erasures])


def _row(live: LiveErasure) -> tuple[object, ...]:
    erasure = live.erasure
    return (
        erasure.concept,
        erasure.method,
        f"{erasure.tau:g}" if erasure.method == "range" else "–",
        f"{erasure.top_fraction:g}",
        erasure.ranking,
        erasure.layers if erasure.layers == "all" else ", ".join(map(str, erasure.layers)),
        "" if erasure.replacement == "zero" else _replacement(erasure.replacement),
        "yes" if live.enforced else "",
        until(live.expires_at) if live.expires_at is not None else "",
        live.reason or "",
    )


def _replacement(replacement: Replacement) -> str:
    return f"damp:{replacement.damp:g}" if isinstance(replacement, Damp) else replacement


def _as_json(live: LiveErasure) -> dict[str, Any]:
    return {**live.erasure.model_dump(mode="json"), **live.model_dump(mode="json", exclude={"erasure"})}
