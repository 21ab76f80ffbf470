"""`neuronlens fleet`: the engines that `serve --ray ADDRESS` left on a cluster."""

from typing import Annotated

import typer

from app.cli import options
from app.cli.exits import EPILOG, CommandError
from app.cli.stores import settings_with
from app.cli.terminal import print_json, say, table
from app.errors import USAGE

app = typer.Typer(
    help="Engines on a Ray cluster, which stay when a server in front of them stops.",
    epilog=EPILOG,
    no_args_is_help=True,
)

Address = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="auto (the cluster that this machine is part of) or host:6379. Default: NEURONLENS_RAY.",
        rich_help_panel=options.CLUSTER_PANEL,
    ),
]


@app.command("list", epilog=EPILOG)
def list_(ray: Address = None, as_json: options.AsJson = False) -> None:
    """List the models that have a fleet on the cluster."""
    address = _address(ray)
    from app.serving.fleet import fleets  # here, because it needs Ray

    found = fleets(address)
    if as_json:
        print_json({"fleets": found})
    else:
        table(("model",), [(name,) for name in found])


@app.command(epilog=EPILOG)
def down(name: Annotated[str, typer.Argument(help="What the model is called.")], ray: Address = None) -> None:
    """End a fleet, when what its engines hold is answered. Servers in front of it then answer 503."""
    address = _address(ray)
    from app.serving.fleet import end_fleet  # here, because it needs Ray

    end_fleet(address, name)
    say(f"the fleet of {name} is down")


def _address(given: str | None) -> str:
    address = settings_with(ray=given).ray
    if address is None or address == options.PRIVATE_CLUSTER:
        raise CommandError("which cluster? pass --ray ADDRESS, or set NEURONLENS_RAY", USAGE)
    return address
