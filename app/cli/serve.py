"""`neuronlens serve`: answer over HTTP."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.choices import ModelChoice
from app.cli import options
from app.cli.exits import CommandError, end_at_once
from app.cli.listening import address_of, bind, fit_command, guarded, keys_create, listen, metrics_apart, observed
from app.cli.stores import settings_with
from app.cli.terminal import hint, progress, say
from app.errors import FAILED, UNREACHABLE, USAGE

if TYPE_CHECKING:
    from app.serving.service import Service
    from app.settings import Settings

Host = Annotated[
    str | None, typer.Option("--host", help="Address to listen at. Default: NEURONLENS_HOST, else 127.0.0.1.")
]
Port = Annotated[
    int | None,
    typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one. Default: NEURONLENS_PORT, else 8000."),
]
Insecure = Annotated[
    bool | None,
    typer.Option("--insecure", help="Allow a --host that other machines reach, though there are no API keys."),
]
MaxSnapshotAge = Annotated[
    float | None,
    typer.Option(
        "--max-snapshot-age",
        min=0.0,
        help="Seconds without word from the store after which /readyz answers 503. "
        "Default: NEURONLENS_MAX_SNAPSHOT_AGE, else never.",
        rich_help_panel=options.STORE_PANEL,
    ),
]
DrainDelay = Annotated[
    float | None,
    typer.Option(
        "--drain-delay",
        min=0.0,
        help="Seconds for which new connections are still answered (503) after SIGTERM. "
        "Default: NEURONLENS_DRAIN_DELAY, else 0.",
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option("--log-level", help="Default: NEURONLENS_LOG_LEVEL, else info. debug logs every request."),
]
LogFormat = Annotated[
    Literal["auto", "json", "text"] | None,
    typer.Option("--log-format", help="Default: NEURONLENS_LOG_FORMAT, else auto: text on a terminal, elsewhere json."),
]
AccessLog = Annotated[
    bool | None,
    typer.Option(
        "--access-log", help="Log every request, by the template of its path. Default: NEURONLENS_ACCESS_LOG."
    ),
]


def serve(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Checkpoint: a directory, or a name on the hub. Default: NEURONLENS_MODEL.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    name: options.Name = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="NAME=CHECKPOINT",
            help="A further model to serve beside it, with live erasures of its own; may be given again. Only with "
            "--ray. Default: NEURONLENS_ALSO, else none.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.DType = None,
    threads: options.Threads = None,
    allow_pickle: options.AllowPickle = None,
    plain: options.Plain = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile",
            help="Compile the model's blocks; the start takes half a minute more, and needs a C++ compiler on a CPU.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    template: options.Template = None,
    scoring: options.Scoring = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-batch-tokens",
            min=16,
            help="Tokens of one batch. Default: NEURONLENS_MAX_BATCH_TOKENS, else 1024 on a CPU.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    trunk_cache_mb: Annotated[
        int | None,
        typer.Option(
            "--trunk-cache-mb",
            min=0,
            help="Megabytes of trunk states to keep, so that a text that comes again costs its tail only. "
            "Default: NEURONLENS_TRUNK_CACHE_MB, else 0.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    host: Host = None,
    port: Port = None,
    insecure: Insecure = None,
    require_keys: Annotated[
        bool | None, typer.Option("--require-keys", help="Refuse every call while no API keys are known.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", min=0, max=65535, help="Serve /metrics on a port of its own instead."),
    ] = None,
    ray: options.Ray = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            "--replicas",
            metavar="N|auto",
            help="Engines on the Ray cluster, or auto: by the tokens that wait. Default: NEURONLENS_REPLICAS, else 1, "
            "or as many as run already.",
            rich_help_panel=options.CLUSTER_PANEL,
        ),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            "--max-replicas",
            min=1,
            help="Most engines with --replicas auto. Default: NEURONLENS_MAX_REPLICAS, else what the cluster has room "
            "for.",
            rich_help_panel=options.CLUSTER_PANEL,
        ),
    ] = None,
    redeploy: Annotated[
        bool,
        typer.Option(
            "--redeploy",
            help="Replace the engines of a fleet that runs with other settings, one by one.",
            rich_help_panel=options.CLUSTER_PANEL,
        ),
    ] = False,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = None,
    max_snapshot_age: MaxSnapshotAge = None,
    drain_delay: DrainDelay = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    access_log: AccessLog = None,
) -> None:
    """Serve a classifier over HTTP, with concepts erased live or per request.

    Stops at Ctrl-C or SIGTERM, after answering what it had accepted.
    """
    settings = settings_with(
        model=model,
        name=name,
        also=also or None,
        revision=revision,
        device=device,
        dtype=dtype,
        threads=threads,
        allow_pickle=allow_pickle,
        plain=plain,
        compile=compile,
        template=template,
        scoring=scoring,
        max_batch_tokens=max_batch_tokens,
        trunk_cache_mb=trunk_cache_mb,
        host=host,
        port=port,
        insecure=insecure,
        require_keys=require_keys,
        metrics_port=metrics_port,
        ray=ray,
        replicas=int(replicas) if replicas and replicas.isdigit() else replicas,
        max_replicas=max_replicas,
        redis_url=redis_url,
        data_dir=data_dir,
        max_snapshot_age=max_snapshot_age,
        drain_delay=drain_delay,
        log_level=log_level,
        log_format=log_format,
        access_log=access_log,
    )
    if settings.model is None:
        raise CommandError("which model? pass --model, or set NEURONLENS_MODEL", USAGE)
    if settings.also and settings.ray is None:
        raise CommandError("--also (NEURONLENS_ALSO) needs --ray: one process alone serves one model", USAGE)
    if settings.ray is None and (settings.replicas is not None or redeploy):
        raise CommandError("--replicas and --redeploy need --ray: one process has one engine", USAGE)
    if settings.ray is not None and settings.fits:
        raise CommandError(
            "a server on Ray takes no fits: unset NEURONLENS_FIT_DIRS and NEURONLENS_FIT_HUB, and use `neuronlens fit`",
            USAGE,
        )
    if settings.ray not in (None, options.PRIVATE_CLUSTER) and settings.redis_url is None:
        raise CommandError("every node needs the store: pass --redis-url, at an address that all of them reach", USAGE)
    with ExitStack() as stack:
        stack.enter_context(observed(settings))
        settings = guarded(settings)
        bound = stack.enter_context(bind(settings))
        with progress("rows") as report:
            if settings.ray is not None:
                report("starting engines on Ray", 0, 0)
                from app.serving.fleet import open_fleet  # here, because it needs Ray

                services = stack.enter_context(
                    open_fleet(settings, redeploy=redeploy, lost_exit_code=UNREACHABLE, skip_cleanup=end_at_once)
                )
            else:
                from app.cli.inputs import check_model

                check_model(ModelChoice.of(settings))
                report("loading the model", 0, 0)
                from app.serving.wiring import open_service  # here, because it loads torch

                services = [stack.enter_context(open_service(settings))]
        serve_until_told(services, settings, bound)


def serve_until_told(
    services: "Sequence[Service]", settings: "Settings", bound: socket.socket, to_try: Sequence[str] = ()
) -> None:
    """Serve until SIGINT or SIGTERM, then answer what was accepted. Says where, and what to try there."""
    from app.main import create_app

    def ready() -> None:
        address = address_of(bound)
        for service in services:
            snapshot = service.mirror.snapshot
            if snapshot is not None and snapshot.range_set is None:
                fit = fit_command(settings, service.model.source, service.name)
                hint(f"{service.name}: nothing can be erased yet: {fit}")
        for line in to_try:
            hint(line.replace("{address}", address))
        if metrics_at is not None:
            hint(f"metrics: {metrics_at}")
        if not services[0].keyring.in_force and settings.loopback:
            hint(
                f"only this machine can reach it; for others: `{keys_create(settings)}`, then serve with --host 0.0.0.0"
            )
        hint(f"console: {address} · API: {address}/docs · stop: Ctrl-C")
        say(f"serving {', '.join(service.name for service in services)} at {address}")

    def draining() -> None:
        for service in services:
            service.drain()

    app = create_app(settings, services)
    with metrics_apart(settings, app) as metrics_at:
        listen(
            app,
            settings,
            bound,
            ready=ready,
            draining=draining,
            failure=lambda: next((each.engine.failure for each in services if each.engine.failure), None),
            failed=FAILED if settings.ray is None else UNREACHABLE,
        )
    hint("stopped; what was accepted is answered")
