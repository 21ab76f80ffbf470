"""`neuronlens demo`: train, fit, measure and serve a small classifier."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options
from app.cli.evaluate import chance_warnings
from app.cli.serve import observed, require_keys, serve_until_signal
from app.cli.terminal import print_json, progress, say, table
from app.settings import Settings

if TYPE_CHECKING:
    from workers.demo.demo import Demo

_POST = "{address}/v1/classify -H 'Content-Type: application/json' -d"
_TEXT = '"inputs": "The striker scored twice in extra time and the home side won the cup."'
TRUNK_CACHE_MB = 64
"""Default of `trunk_cache_mb` for the demo: the web console's sliders classify one text again and again."""
MEAN = "mean"
"""Target of the row with the average over all targets."""
EXAMPLES = (
    "try:",
    f"""  curl -s {_POST} '{{{_TEXT}, "erase": {{"concepts": ["Sports"], "top_fraction": 1.0}}, "compare": true}}'""",
    """  curl -s -X PUT {address}/v1/erasures/Sports -H 'Content-Type: application/json' -d '{"top_fraction": 1.0}'""",
    f"""  curl -s {_POST} '{{{_TEXT}}}'""",
)
"""Commands to try while it serves; `{address}` is replaced by the server's URL."""


@options.expand
def demo(
    settings: Annotated[Settings, options.SettingsOptions("host", "port", "insecure", *options.LOGGING)],
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Directory of the demo. Default: demo/ in the data directory.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train and fit again, ignoring the cache.")] = False,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve it at the end.")] = True,
    as_json: options.AsJson = False,
) -> None:
    """Train a small classifier, fit its ranges, show the effect of erasing, and serve it.

    Needs no downloads. The results are cached, so the second start is quick.
    """
    from app.http.server import bind

    settings = demo_settings(settings, cache_dir)
    with ExitStack() as stack:
        stack.enter_context(observed(settings))
        settings = require_keys(settings)
        bound = stack.enter_context(bind(settings)) if serve else None
        with progress("") as on_progress:
            on_progress("loading", 0, 0)
            from app.serving.demo import open_demo  # here, because it loads torch

            service, made = stack.enter_context(open_demo(settings, on_progress, rebuild=rebuild))
        if as_json:
            rows = [row.as_json() for row in made.evaluation.rows]
            print_json({"accuracy": made.accuracy, "range_set": made.range_set, "rows": rows})
        else:
            _print(made)
        if bound is not None:
            serve_until_signal([service], settings, bound, EXAMPLES)


def demo_settings(settings: Settings, cache_dir: Path | None) -> Settings:
    """The settings with a private store for the demo, but with the usual reports."""
    return settings.model_copy(
        update={
            "redis_url": None,
            "data_dir": cache_dir or settings.data_dir / "demo",
            "reports_dir": settings.reports,
            "trunk_cache_mb": settings.trunk_cache_mb or TRUNK_CACHE_MB,
        }
    )


def _print(made: "Demo") -> None:
    """Print accuracies on the target and on the others: unmasked, with neuron masking, with range masking."""
    neuron = {row.target: row for row in made.evaluation.rows if row.method == "neuron"}
    ranged = {row.target: row for row in made.evaluation.rows if row.method == "range"}
    sentences = neuron[MEAN].n_target
    say(f"accuracy on {sentences} held-out sentences: {made.accuracy:.3f}")
    say("accuracy with one concept erased at all neurons of the last block: its own sentences | all others")
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
    for line in chance_warnings(made.evaluation.rows):
        say(line)
