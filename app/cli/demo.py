"""`neuronlens demo`: everything at once, from nothing."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options
from app.cli.evaluate import about_chance
from app.cli.listening import bind, guarded, observed
from app.cli.serve import AccessLog, Host, Insecure, LogFormat, LogLevel, Port, serve_until_told
from app.cli.stores import settings_with
from app.cli.terminal import print_json, progress, say, table

if TYPE_CHECKING:
    from app.serving.wiring import Demo
    from app.settings import Settings

_POST = "{address}/v1/classify -H 'Content-Type: application/json' -d"
_TEXT = '"inputs": "The striker scored twice in extra time and the home side won the cup."'
TRUNK_CACHE_MB = 64
"""Megabytes of trunk states that the demo keeps."""
MEAN = "mean"
"""Target name of the row that averages over the targets."""
TO_TRY = (
    "try:",
    f"""  curl -s {_POST} '{{{_TEXT}, "erase": {{"concepts": ["Sports"], "top_fraction": 1.0}}, "compare": true}}'""",
    """  curl -s -X PUT {address}/v1/erasures/Sports -H 'Content-Type: application/json' -d '{"top_fraction": 1.0}'""",
    f"""  curl -s {_POST} '{{{_TEXT}}}'""",
)
"""What to type when it serves; {address} stands for where."""


def demo(
    host: Host = None,
    port: Port = None,
    insecure: Insecure = None,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Where it is kept. Default: demo/ in the data directory.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train and fit anew, whatever is cached.")] = False,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve it when it is ready.")] = True,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    access_log: AccessLog = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a small classifier, fit its ranges, show what erasing does, and serve it.

    Needs nothing from outside, and keeps what it made: the second start is quick.
    """
    settings = settings_with(
        host=host, port=port, insecure=insecure, log_level=log_level, log_format=log_format, access_log=access_log
    )
    settings = of_demo(settings, cache_dir)
    with ExitStack() as stack:
        stack.enter_context(observed(settings))
        settings = guarded(settings)
        bound = stack.enter_context(bind(settings)) if serve else None
        with progress("") as report:
            report("loading", 0, 0)
            from app.serving.wiring import open_demo  # here, because it loads torch

            service, made = stack.enter_context(open_demo(settings, report, rebuild=rebuild))
        if as_json:
            rows = [row.as_json() for row in made.evaluation.rows]
            print_json({"accuracy": made.accuracy, "range_set": made.range_set, "rows": rows})
        else:
            _show(made)
        if bound is not None:
            serve_until_told([service], settings, bound, TO_TRY)


def of_demo(settings: "Settings", cache_dir: Path | None) -> "Settings":
    """The demo's settings: a private Redis of its own, whatever store is named; reports where `evaluate` puts them."""
    own = {"redis_url": None, "data_dir": cache_dir or settings.data_dir / "demo", "reports_dir": settings.reports}
    # the console's sliders ask about one text again and again
    return settings.model_copy(update={**own, "trunk_cache_mb": settings.trunk_cache_mb or TRUNK_CACHE_MB})


def _show(made: "Demo") -> None:
    """Target versus the others: unmasked, by neuron masking, by range masking."""
    neuron = {row.target: row for row in made.evaluation.rows if row.method == "neuron"}
    ranged = {row.target: row for row in made.evaluation.rows if row.method == "range"}
    sentences = neuron[MEAN].n_target
    say(f"accuracy on {sentences} held-out sentences: {made.accuracy:.3f}")
    say("the same when one concept is erased at all neurons of the last block: its own sentences | all others")
    table(
        ("erased", "unmasked", "neuron masking", "range masking"),
        [
            (
                target,
                f"{row.base_acc:.3f} | {row.base_cacc:.3f}",
                f"{row.base_acc + row.delta_acc:.3f} | {row.base_cacc + row.delta_cacc:.3f}",
                f"{row.base_acc + ranged[target].delta_acc:.3f} | {row.base_cacc + ranged[target].delta_cacc:.3f}",
            )
            for target, row in neuron.items()
        ],
    )
    for line in about_chance(made.evaluation.rows):
        say(line)
