"""`neuronlens erase`: the live erasures, which apply to requests that name none."""

from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from app.cli import options
from app.cli.clock import duration, until
from app.cli.control import WAIT_SECONDS, control_of
from app.cli.exits import EPILOG, CommandError
from app.cli.terminal import print_json, say, table
from app.errors import USAGE
from range_store.domain.erasure import Damp, Erasure, Ranking, Replacement
from range_store.domain.live import LiveErasure, LiveState

app = typer.Typer(
    help="Live erasures: switch concepts off in answers while traffic flows.", epilog=EPILOG, no_args_is_help=True
)

Concept = Annotated[str, typer.Argument(metavar="CONCEPT", help="A concept of the active range set.")]


@app.command("list", epilog=EPILOG)
def list_(
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """List what is erased now."""
    with control_of(url, redis_url, data_dir, name) as control:
        state = control.live()
    _print(state, as_json)


@app.command(epilog=EPILOG)
def on(
    concept: Concept,
    method: Annotated[Literal["range", "neuron"], typer.Option("--method", help="Mask ranges, or neurons.")] = "range",
    tau: Annotated[
        float, typer.Option("--tau", min=0.0, help="Half-width of the ranges, in standard deviations.")
    ] = 2.5,
    top_fraction: Annotated[str, typer.Option("--top-fraction", help="Share of the neurons, in (0, 1].")] = "0.3",
    ranking: Annotated[Ranking, typer.Option("--ranking", help="How neurons are ranked.")] = "max",
    layer: options.Layer = "-1",
    replacement: Annotated[
        str, typer.Option("--replacement", help="What masked neurons become: zero, mean or damp:FACTOR.")
    ] = "zero",
    enforced: Annotated[
        bool, typer.Option("--enforced", help="Join it to every request, whatever the request says.")
    ] = False,
    reason: options.Reason = None,
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Switch it off by itself: seconds, or 15m, 2h, 1d.")
    ] = None,
    if_match: options.IfMatch = None,
    wait: options.Wait = None,
    wait_seconds: options.WaitSeconds = WAIT_SECONDS,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Erase a concept from all answers, or change how it is erased. The next request sees it."""
    fractions = options.fractions(top_fraction)
    if len(fractions) > 1:
        raise typer.BadParameter("one share, not several", param_hint="--top-fraction")
    layers = options.layers(layer)
    replace = options.replacement(replacement)
    seconds = duration(expires_in) if expires_in else None
    try:
        erasure = Erasure(
            concept=concept,
            method=method,
            tau=options.taus(str(tau))[0],
            top_fraction=fractions[0],
            ranking=ranking,
            layers=layers,
            replacement=replace,
        )
        live = LiveErasure(erasure=erasure, enforced=enforced, reason=reason)
    except ValidationError as error:
        raise CommandError(error.errors()[0]["msg"].removeprefix("Value error, "), USAGE) from None
    with control_of(url, redis_url, data_dir, name, wait=wait_seconds if wait else None) as control:
        state = control.switch_on(live, expires_in=seconds, if_match=if_match)
    _print(state, as_json, f"erasing {concept!r}")


@app.command(epilog=EPILOG)
def off(
    concept: Annotated[str | None, typer.Argument(metavar="CONCEPT", help="A concept that is erased.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Switch all erasures off, in one step.")] = False,
    reason: options.Reason = None,
    if_match: options.IfMatch = None,
    wait: options.Wait = None,
    wait_seconds: options.WaitSeconds = WAIT_SECONDS,
    url: options.Url = None,
    name: options.ServedName = None,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Erase a concept no more."""
    if (concept is None) != everything:
        raise typer.BadParameter("name one concept, or pass --all", param_hint="CONCEPT")
    with control_of(url, redis_url, data_dir, name, wait=wait_seconds if wait else None) as control:
        erased = {each.concept for each in control.live().erasures}
        if concept is None:
            state = control.switch_all_off(reason=reason, if_match=if_match)
        else:
            state = control.switch_off(concept, reason=reason, if_match=if_match)
    if concept is None:
        done = "erasing nothing" + ("" if erased else ", as before")
    else:
        done = f"no longer erasing {concept!r}" if concept in erased else f"{concept!r} was not erased: nothing changed"
    _print(state, as_json, done)


def _print(state: LiveState, as_json: bool, headline: str = "") -> None:
    if as_json:
        found = [_as_json(each) for each in state.erasures]
        print_json({"generation": state.generation, "range_set": state.range_set, "erasures": found})
        return
    say(f"{headline + ', ' if headline else ''}generation {state.generation}")
    if not state.erasures:
        say("nothing is erased" if state.range_set else "no range set is active: nothing can be erased")
        return
    columns = (
        "concept",
        "method",
        "τ",
        "top",
        "ranking",
        "layers",
        "replacement",
        "enforced",
        "expires",
        "reason",
    )
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
