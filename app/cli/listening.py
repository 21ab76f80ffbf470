"""Listening for `serve` and `demo`: a socket bound before the model loads, a server that drains, logs on stderr."""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from app.cli.commands import command
from app.cli.exits import CommandError, exit_code_of
from app.cli.terminal import hint
from app.errors import FAILED, INTERRUPTED, USAGE

if TYPE_CHECKING:
    from fastapi import FastAPI

    from app.http.protocol import Connections
    from app.settings import Settings

logger = logging.getLogger(__name__)

OTHER_FILES = 128
"""Open files of a server besides its connections: the store's sockets, the log, checkpoints, fits."""
IDLE_GRACE = 0.2
"""Seconds after SIGTERM in which a request may still come on a connection that was idle, and is told to close it."""


def guarded(settings: "Settings") -> "Settings":
    """The settings, so that nobody from outside comes in without a key.

    On an address that others reach, keys must exist, and are then required for good: should they be lost, everyone is
    refused. A store that is away cannot tell: the server starts, and refuses everyone until it knows.

    Raises:
        CommandError: others could reach the server, no keys exist, and that was not asked for by name.
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
        hint(f"{error}; every call is refused until the API keys are read")
        exist = True
    if not exist:
        raise CommandError(
            f"--host {settings.host} lets other machines in, and no API key exists yet to tell who may: "
            f"`{keys_create(settings)}` makes one; or serve at 127.0.0.1, or pass --insecure",
            USAGE,
        )
    return settings.model_copy(update={"require_keys": True})


def keys_create(settings: "Settings") -> str:
    """The command that makes a key in the store of the settings."""
    return command("keys", "create", "NAME", scope="infer", **_store_options(settings))


def fit_command(settings: "Settings", source: str, name: str) -> str:
    """The command that fits and activates ranges for a served model in the store of the settings."""
    how_to_load: dict[str, object] = {"name": None if name == Path(source).name else name}
    if source == settings.model:
        how_to_load |= {"revision": settings.revision, "template": settings.template}
        how_to_load |= {"dtype": None if settings.dtype == "auto" else settings.dtype}
        how_to_load |= {"scoring": settings.scoring if settings.template else None}
    return command("fit", model=source, **how_to_load, data="FILE", activate=True, **_store_options(settings))


def _store_options(settings: "Settings") -> dict[str, object]:
    """The options that lead other commands to a store that is not where they look by themselves."""
    from app.settings import usual_data_dir

    if settings.redis_url is not None:
        by_itself = settings.redis_url == os.environ.get("NEURONLENS_REDIS_URL")
        return {"redis_url": None if by_itself else settings.redis_url}
    return {"data_dir": None if settings.data_dir == usual_data_dir() else settings.data_dir}


@contextmanager
def metrics_apart(settings: "Settings", app: "FastAPI") -> Iterator[str | None]:
    """Serves /metrics, and where replicas have theirs, on their own port if the settings name one; gives where.

    Raises:
        CommandError: the port is taken or not allowed.
    """
    if settings.metrics_port is None:
        yield None
        return
    from app.serving.metrics import start_metrics_server

    host = settings.metrics_host or settings.host
    where = f"{host}:{settings.metrics_port}"
    try:
        server, thread = start_metrics_server(settings.metrics_port, host, app.state.registry, app.state.served)
    except (OSError, UnicodeError) as error:
        bad = isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        raise CommandError(f"cannot serve metrics at {where}: {_reason(error)}", USAGE if bad else FAILED) from None
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def bind(settings: "Settings") -> socket.socket:
    """A socket at the settings' address, so that a taken port is known before minutes of loading.

    Raises:
        CommandError: the port is taken or not allowed, or there is no such address; says which.
    """
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:  # a name that no host can have is no OSError
        raise CommandError(f"no such address: {settings.host} ({_reason(error)})", USAGE) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise CommandError(f"{where} is taken: stop what listens there, or choose another --port", FAILED) from None
        code = USAGE if error.errno == errno.EADDRNOTAVAIL else FAILED
        raise CommandError(f"cannot listen at {where}: {error.strerror}", code) from None
    return bound


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket, with the port that the system chose where 0 was asked for."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


@contextmanager
def observed(settings: "Settings") -> Iterator[None]:
    """Logs on stderr in the settings' format, and traces exported if they are asked for, until it is left.

    Raises:
        CommandError: an error that is none of those a user can meet; it is in the log.
    """
    from app.observability import logs, tracing

    with logs.configured(settings), tracing.exported():
        try:
            yield
        except Exception as error:
            if exit_code_of(error) is not None:
                raise
            logger.critical("the program failed: %s", type(error).__name__, exc_info=error)
            raise CommandError(f"a fault of the program ({type(error).__name__}); its log says where") from None


def listen(
    app: "FastAPI",
    settings: "Settings",
    bound: socket.socket,
    *,
    ready: Callable[[], None],
    draining: Callable[[], None],
    failure: Callable[[], str | None],
    failed: int = FAILED,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer what was accepted, for `settings.drain_seconds` at most.

    Until that is done, and for `settings.drain_delay` after SIGTERM at least, new connections are taken, so that they
    are told 503 instead of being refused. Every reply of that time closes its connection; idle connections are closed
    after it. A second signal ends it at once.

    Args:
        ready: called when requests are taken.
        draining: called at once when the signal comes; from a signal handler, so it must not wait.
        failure: asked ten times a second; once it says why nothing can be answered any more, the server stops.
        failed: exit code of that.

    Raises:
        CommandError: the port was taken meanwhile, there was a failure, or accepted requests were cut off.
    """
    from app.http.protocol import http_protocol

    protocol = http_protocol(_within_open_files(settings), app.state.registry)
    config = uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,  # app.observability.access_log has the lines, without what callers put into paths
        server_header=False,
    )
    server = _Server(config, settings, protocol.shared, ready, draining, failure)
    # uvicorn raises the signal again when it is done; by then it has done its work, and resources wait to be released
    before = {each: signal.signal(each, _ignore) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    except OSError as error:
        raise CommandError(f"cannot listen at {settings.host}:{settings.port}: {error.strerror}", FAILED) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if (why := failure()) is not None:
        raise CommandError(f"the model cannot answer any more ({why}); start the server again", failed)
    if not server.started:
        raise CommandError("the server did not start; its log says why", FAILED)
    if server.cut_off and server.force_exit:
        raise CommandError(f"stopped at once by a second signal; not answered: {server.cut_off}", INTERRUPTED)
    if server.cut_off:
        why = f"accepted requests that were not answered within {settings.drain_seconds} s: {server.cut_off}"
        raise CommandError(f"{why}; NEURONLENS_DRAIN_SECONDS gives them longer", FAILED)


class _Server(uvicorn.Server):
    """`cut_off`: how many accepted requests were not answered when it ended."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: "Settings",
        connections: "Connections",
        ready: Callable[[], None],
        draining: Callable[[], None],
        failure: Callable[[], str | None],
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._ready, self._draining, self._failure = ready, draining, failure
        self._drain_seconds, self._drain_delay = settings.drain_seconds, settings.drain_delay
        self._told: float | None = None
        """When the first signal came, by the monotonic clock."""
        self._listens_until = 0.0
        self.cut_off = 0

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._failure() is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._told is not None:
            self.force_exit = True
        else:
            self._told = time.monotonic()
            grace = IDLE_GRACE if self._connections.waiting else 0.0
            self._listens_until = self._told + (max(self._drain_delay, grace) if sig == signal.SIGTERM else 0.0)
            self._connections.draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
        self._draining()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ends = (self._told or time.monotonic()) + self._drain_seconds
        accepted = set(self.server_state.tasks)
        self._connections.draining = True
        for connection in self._connections.open:
            connection.answer_last()
        if self._failure() is None:
            await self._go_on_listening(accepted, ends)
        left = max(0.05, ends - time.monotonic())
        self.config.timeout_graceful_shutdown = left  # type: ignore[assignment]  # any number of seconds will do
        await super().shutdown(sockets)

    async def _wait_tasks_to_complete(self) -> None:
        try:
            await super()._wait_tasks_to_complete()
        finally:  # cancelled when the time is over; what is left is cancelled next
            self.cut_off = len(self.server_state.tasks)

    async def _go_on_listening(self, accepted: set[asyncio.Task[None]], ends: float) -> None:
        """Return when those are done and it is time, at `ends` by the monotonic clock, or at a second signal."""
        tick = 0
        while not self.force_exit and (now := time.monotonic()) < ends:
            if now >= self._listens_until and all(task.done() for task in accepted):
                return
            tick += 1
            await super().on_tick(tick)  # it keeps the Date header
            await asyncio.sleep(0.05)


def _within_open_files(settings: "Settings") -> "Settings":
    """The settings, with as many connections as the limit on open files leaves room for."""
    room = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES)
    if room >= settings.max_connections:
        return settings
    logger.warning(
        "at most %d connections instead of %d: the limit on open files (ulimit -n) allows no more",
        room,
        settings.max_connections,
    )
    return settings.model_copy(update={"max_connections": room})


def _ignore(sig: int, frame: object) -> None:
    pass
