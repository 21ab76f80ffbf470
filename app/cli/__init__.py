"""The command line, `neuronlens`: a module per command or group of commands.

Shared by them: `options` and `parsing` (options and their values), `terminal` (output), `exits` (exit codes), `control`
and `server_control` (the store, or a server).
Nothing here imports torch: commands import an entry point of `app.serving` when they need it.
"""

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from app.cli import erase, keys, ranges
from app.cli.demo import demo
from app.cli.erase import audit
from app.cli.evaluate import evaluate
from app.cli.exits import EPILOG, exit_code_of, leave
from app.cli.fit import fit
from app.cli.options import RayCommand
from app.cli.serve import fleet, serve
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
    # Typer keeps the line breaks of all paragraphs but the first
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in (command.__doc__ or "").split("\n\n"))
    app.command(help=text, epilog=EPILOG, cls=RayCommand)(command)
app.add_typer(ranges.app, name="ranges")
app.add_typer(erase.app, name="erase")
app.add_typer(keys.app, name="keys")
app.add_typer(fleet, name="fleet")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"neuronlens {version('neuronlens')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Expected errors are printed as one line on stderr.

    Args:
        arguments: without the program's name; by default those of the process.
    """
    try:
        result = app(args=arguments, prog_name="neuronlens", standalone_mode=False)
    except typer.TyperException as error:
        # without arguments, the help is printed, and the message is empty
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
    # these libraries' own progress bars would interrupt ours
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # hides its retries; we report the final failure
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    leave(run())


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM like Ctrl-C, so that a command releases its private Redis and scratch directories."""
    raise KeyboardInterrupt
