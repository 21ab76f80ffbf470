"""`neuronlens demo`: everything at once, from nothing."""

from typing import Annotated

import typer

from app.cli.console import stderr


def demo(
    host: Annotated[str, typer.Option("--host", help="Address to serve at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to serve at.")] = 8000,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train and fit anew, whatever is cached.")] = False,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve it when it is ready.")] = True,
) -> None:
    """Train a small classifier, fit its ranges, show what erasing does, and serve it."""
    from app.wiring import run_demo  # here, because it loads torch

    run_demo(port=port, host=host, rebuild=rebuild, serve=serve, console=stderr())
