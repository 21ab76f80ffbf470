"""The command line (DESIGN "Command line"): `neuronlens`. One module per command or group of commands.

`options` what several commands ask, and comma lists · `terminal` output · `exits` exit codes ·
`stores`, `control`, `server_control` the store, directly or through a running server · `listening` the HTTP server ·
`clock` times and durations.
Nothing here imports torch: jobs that need it go through `app.serving.wiring`, imported when they start.
"""

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from app.cli import erase, fleet, keys, ranges
from app.cli.audit import audit
from app.cli.demo import demo
from app.cli.evaluate import evaluate
from app.cli.exits import EPILOG, exit_code_of, leave
from app.cli.fit import fit
from app.cli.options import RayCommand
from app.cli.serve import serve
from app.cli.terminal import error_line, say
from app.cli.train import train

app = typer.Typer(
    name="neuronlens",
    help="Classify text with a transformer while erasing chosen concepts from its activations, live.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, serve, fit, evaluate, train, audit):
    # typer would keep the line breaks of every paragraph but the first
    told = "\n\n".join(" ".join(paragraph.split()) for paragraph in (command.__doc__ or "").split("\n\n"))
    app.command(help=told, epilog=EPILOG, cls=RayCommand)(command)
app.add_typer(ranges.app, name="ranges")
app.add_typer(erase.app, name="erase")
app.add_typer(keys.app, name="keys")
app.add_typer(fleet.app, name="fleet")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"neuronlens {version('neuronlens')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code. An error that a user can meet is one line on stderr.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    try:
        result = app(args=arguments, prog_name="neuronlens", standalone_mode=False)
    except typer.TyperException as error:
        # without arguments, help was printed already, and the message is empty
        if message := error.format_message().strip():
            context = getattr(error, "ctx", None)
            error_line(message.rstrip(".") + (f"; see `{context.command_path} --help`" if context else ""))
        return error.exit_code
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_of(error)
        if code is None:
            raise
        error_line(_sentence(error))
        return code
    return result if isinstance(result, int) else 0


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def main() -> None:
    """Entry point of the command."""
    # Progress is told by our own bars; those of the libraries would stand between them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries; what failed in the end is our own one line
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    leave(run())


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does: what it holds (a private Redis, a scratch directory) is released."""
    raise KeyboardInterrupt
