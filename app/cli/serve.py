"""`neuronlens serve`: answer over HTTP; and `neuronlens fleet`: the engines that it leaves on a Ray cluster."""

import errno
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options
from app.cli.exits import EPILOG, CommandError, end_at_once, exit_code_of
from app.cli.terminal import fit_command, hint, keys_create_command, print_json, progress, say, table
from app.errors import FAILED, UNREACHABLE, USAGE
from app.serving.inputs import check_model
from app.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from app.serving.service import Service

logger = logging.getLogger(__name__)


@options.expand
def serve(
    settings: Annotated[
        Settings,
        options.SettingsOptions(
            *("model", *options.MODEL, "also", "compile", "max_batch_tokens", "trunk_cache_mb"),
            *("host", "port", "insecure", "require_keys", "metrics_port", "drain_delay", *options.LOGGING),
            *("ray", "replicas", "max_replicas", *options.STORE, "max_snapshot_age"),
        ),
    ],
    redeploy: Annotated[
        bool,
        typer.Option(
            "--redeploy",
            help="Replace the engines of a fleet that runs with other settings, one by one.",
            rich_help_panel=options.CLUSTER_PANEL,
        ),
    ] = False,
) -> None:
    """Serve a classifier over HTTP, with concepts erased live or per request.

    Ctrl-C or SIGTERM stops it after it has answered the requests that it accepted.
    """
    _check(settings, redeploy)
    from app.http.server import bind

    with ExitStack() as stack:
        stack.enter_context(observed(settings))
        settings = require_keys(settings)
        bound = stack.enter_context(bind(settings))
        with progress("rows") as on_progress:
            if settings.ray is not None:
                on_progress("starting engines on Ray", 0, 0)
                from app.serving.fleet import open_fleet  # here, because it needs Ray

                services = stack.enter_context(
                    open_fleet(settings, redeploy=redeploy, lost_exit_code=UNREACHABLE, skip_cleanup=end_at_once)
                )
            else:
                check_model(settings)
                on_progress("loading the model", 0, 0)
                from app.serving.serve import open_service  # here, because it loads torch

                services = [stack.enter_context(open_service(settings))]
        serve_until_signal(services, settings, bound)


def _check(settings: Settings, redeploy: bool) -> None:
    """Raises CommandError for settings that do not fit together."""
    if settings.model is None:
        raise CommandError("no model: pass --model, or set NEURONLENS_MODEL", USAGE)
    if settings.ray is None:
        if settings.also:
            raise CommandError("--also (NEURONLENS_ALSO) needs --ray: without it, a server has one model", USAGE)
        if settings.replicas is not None or redeploy:
            raise CommandError("--replicas and --redeploy need --ray: without it, a server has one engine", USAGE)
        return
    if settings.fits:
        raise CommandError(
            "a server on Ray accepts no fits: unset NEURONLENS_FIT_DIRS and NEURONLENS_FIT_HUB, and use "
            "`neuronlens fit`",
            USAGE,
        )
    if settings.ray != options.PRIVATE_CLUSTER and settings.redis_url is None:
        raise CommandError("no store for the cluster: pass a --redis-url that all nodes can reach", USAGE)


def serve_until_signal(
    services: "Sequence[Service]", settings: Settings, bound: socket.socket, examples: Sequence[str] = ()
) -> None:
    """Serve until SIGINT or SIGTERM, then answer the accepted requests. Prints the address and the examples."""
    from app.http.server import address_of, listen
    from app.main import create_app

    def ready() -> None:
        address = address_of(bound)
        for service in services:
            snapshot = service.mirror.snapshot
            if snapshot is not None and snapshot.range_set is None:
                fit = fit_command(settings, service.model.source, service.name)
                hint(f"{service.name}: no range set is active, so nothing can be erased yet: {fit}")
        for line in examples:
            hint(line.replace("{address}", address))
        if metrics_address is not None:
            hint(f"metrics: {metrics_address}")
        if not services[0].keyring.in_force and settings.loopback:
            keys_create = keys_create_command(settings)
            hint(f"only this machine can reach it; for others, run `{keys_create}`, then serve with --host 0.0.0.0")
        hint(f"console: {address} · API: {address}/docs · stop: Ctrl-C")
        say(f"serving {', '.join(service.name for service in services)} at {address}")

    def drain() -> None:
        for service in services:
            service.drain()

    def failure() -> str | None:
        return next((each.engine.failure for each in services if each.engine.failure), None)

    app = create_app(settings, services)
    with metrics_server(settings, app) as metrics_address:
        listen(
            app,
            settings,
            bound,
            on_ready=ready,
            on_drain=drain,
            failure=failure,
        )
    if (reason := failure()) is not None:
        exit_code = FAILED if settings.ray is None else UNREACHABLE
        raise CommandError(f"the model failed ({reason}): restart the server", exit_code)
    hint("stopped; all accepted requests are answered")


def require_keys(settings: Settings) -> Settings:
    """The settings with `require_keys` if other machines can reach the server, so that none comes in without a key.

    API keys must exist then. If they are lost later, or the store cannot be reached, every request is refused.

    Raises:
        CommandError: other machines could reach the server, no key exists, and `insecure` is not set.
    """
    if settings.loopback or settings.insecure or settings.require_keys:
        return settings
    from range_store.embedded.connection import connect
    from range_store.errors import InvalidStoreAddress, StoreUnavailable
    from range_store.storage.api_keys import ApiKeyStore

    try:
        with connect(**settings.redis) as client:
            exist = ApiKeyStore(client).read() is not None
    except StoreUnavailable as error:
        if settings.redis_url is None or isinstance(error, InvalidStoreAddress):
            raise
        hint(f"{error}; every request is refused until the API keys can be read")
        exist = True
    if not exist:
        raise CommandError(
            f"other machines can reach --host {settings.host}, but no API key exists: create one with "
            f"`{keys_create_command(settings)}`, listen on 127.0.0.1, or pass --insecure",
            USAGE,
        )
    return settings.model_copy(update={"require_keys": True})


@contextmanager
def metrics_server(settings: Settings, app: "FastAPI") -> Iterator[str | None]:
    """Serves /metrics and the replicas' targets on `metrics_port`, and yields the address; None without that setting.

    Raises:
        CommandError: the port is in use or not allowed.
    """
    if settings.metrics_port is None:
        yield None
        return
    from app.http.server import reason_of
    from app.serving.metrics import start_metrics_server

    host = settings.metrics_host or settings.host
    where = f"{host}:{settings.metrics_port}"
    try:
        server, thread = start_metrics_server(settings.metrics_port, host, app.state.registry, app.state.models)
    except (OSError, UnicodeError) as error:
        bad = isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        raise CommandError(f"cannot serve metrics at {where}: {reason_of(error)}", USAGE if bad else FAILED) from None
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def observed(settings: Settings) -> Iterator[None]:
    """Logs on stderr in the settings' format, and exports traces if they are configured.

    Raises:
        CommandError: a bug; its traceback is in the log.
    """
    from app.observability import logs, tracing

    with logs.configured(settings), tracing.exported():
        try:
            yield
        except Exception as error:
            if exit_code_of(error) is not None:
                raise
            logger.critical("the program failed: %s", type(error).__name__, exc_info=error)
            raise CommandError(f"internal error ({type(error).__name__}): see the log") from None


fleet = typer.Typer(
    help="Engines on a Ray cluster. They keep running when the server in front of them stops.",
    epilog=EPILOG,
    no_args_is_help=True,
)
Address = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster: auto (the cluster that this machine belongs to) or host:6379. Default: NEURONLENS_RAY.",
        rich_help_panel=options.CLUSTER_PANEL,
    ),
]


@fleet.command("list", epilog=EPILOG)
def list_fleets(ray: Address = None, as_json: options.AsJson = False) -> None:
    """List the models that have a fleet on the cluster."""
    address = _address(ray)
    from app.serving.fleet import fleets  # here, because it needs Ray

    found = fleets(address)
    if as_json:
        print_json({"fleets": found})
    else:
        table(("model",), [(name,) for name in found])


@fleet.command(epilog=EPILOG)
def down(name: Annotated[str, typer.Argument(help="Served name of the model.")], ray: Address = None) -> None:
    """Stop a fleet after it has answered its requests. Servers in front of it then answer 503."""
    address = _address(ray)
    from app.serving.fleet import end_fleet  # here, because it needs Ray

    end_fleet(address, name)
    say(f"the fleet of {name} is down")


def _address(given: str | None) -> str:
    address = options.settings_with(ray=given).ray
    if address is None or address == options.PRIVATE_CLUSTER:
        raise CommandError("no cluster: pass --ray ADDRESS, or set NEURONLENS_RAY", USAGE)
    return address
