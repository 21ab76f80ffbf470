"""The HTTP server: a socket that is bound before a model loads, and uvicorn with graceful draining.

uvicorn closes its sockets at the first signal. Behind a load balancer that would refuse connections until it notices,
so this server goes on accepting them for a while, and answers them with 503.
"""

import asyncio
import errno
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from app.http.protocol import Connections, http_protocol
from app.settings import Settings

logger = logging.getLogger(__name__)

OTHER_FILES = 128
"""Open files of a server besides its connections: sockets of the store, logs, checkpoints, fits."""
IDLE_GRACE = 0.2
"""Seconds after SIGTERM in which a request on an idle connection is still answered, with `Connection: close`."""


class AddressInvalid(Exception):
    """This machine does not have the address."""


class ListenFailed(Exception):
    """The server could not listen or start."""


class RequestsCutOff(Exception):
    """Accepted requests were not answered in time."""


class StoppedAtOnce(Exception):
    """A second signal stopped the server before it had answered its requests."""


def bind(settings: Settings) -> socket.socket:
    """A socket at the settings' address, bound early so that a port in use fails before minutes of loading.

    Raises:
        AddressInvalid: there is no such address.
        ListenFailed: the port is in use or not allowed.
    """
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:  # an impossible host name raises UnicodeError
        raise AddressInvalid(f"no such address: {settings.host} ({reason_of(error)})") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenFailed(
                f"{where} is in use: stop the program that listens there, or choose another --port"
            ) from None
        failed = AddressInvalid if error.errno == errno.EADDRNOTAVAIL else ListenFailed
        raise failed(f"cannot listen on {where}: {error.strerror}") from None
    return bound


def reason_of(error: Exception) -> str:
    """The system's message of an error."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket, with the actual port."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def listen(
    app: FastAPI,
    settings: Settings,
    bound: socket.socket,
    *,
    on_ready: Callable[[], None],
    on_drain: Callable[[], None],
    failure: Callable[[], str | None],
) -> None:
    """Serve until SIGINT or SIGTERM, then drain: answer accepted requests, for at most `settings.drain_seconds`.

    While draining, and for at least `settings.drain_delay` after SIGTERM, new connections are still accepted, so that
    they get a 503 instead of being refused. Every response closes its connection; idle connections are closed at the
    end. A second signal stops the server immediately.

    Args:
        on_ready: called when requests are accepted.
        on_drain: called from the signal handler, so it must not block.
        failure: called ten times a second. Once it returns why no request can be answered any more, the server stops.

    Raises:
        ListenFailed, RequestsCutOff, StoppedAtOnce: see there.
    """
    protocol = http_protocol(_within_open_files(settings), app.state.registry)
    config = uvicorn.Config(
        app,
        http=protocol,
        log_config=None,
        access_log=False,  # see app.observability.access_log, which does not log paths
        server_header=False,
    )
    server = _Server(config, settings, protocol.shared, on_ready, on_drain, failure)
    # uvicorn raises the signal again at the end, when resources are still to be released
    before = {each: signal.signal(each, _ignore) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    except OSError as error:
        raise ListenFailed(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if failure() is not None:
        return
    if not server.started:
        raise ListenFailed("the server did not start: see the log")
    if server.cut_off and server.force_exit:
        raise StoppedAtOnce(f"stopped by a second signal; requests not answered: {server.cut_off}")
    if server.cut_off:
        unanswered = f"accepted requests not answered within {settings.drain_seconds} s: {server.cut_off}"
        raise RequestsCutOff(f"{unanswered}; NEURONLENS_DRAIN_SECONDS allows more time")


class _Server(uvicorn.Server):
    """A server that drains. `cut_off`: number of accepted requests that were not answered at the end."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        connections: Connections,
        on_ready: Callable[[], None],
        on_drain: Callable[[], None],
        failure: Callable[[], str | None],
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._on_ready, self._on_drain, self._failure = on_ready, on_drain, failure
        self._drain_seconds, self._drain_delay = settings.drain_seconds, settings.drain_delay
        self._signalled_at: float | None = None
        """Time of the first signal, by the monotonic clock."""
        self._listens_until = 0.0
        self.cut_off = 0

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._failure() is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._signalled_at is not None:
            self.force_exit = True
        else:
            self._signalled_at = time.monotonic()
            grace = IDLE_GRACE if self._connections.waiting else 0.0
            self._listens_until = self._signalled_at + (max(self._drain_delay, grace) if sig == signal.SIGTERM else 0.0)
            self._connections.draining = True
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
        self._on_drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ends = (self._signalled_at or time.monotonic()) + self._drain_seconds
        accepted = set(self.server_state.tasks)
        self._connections.draining = True
        for connection in self._connections.open:
            connection.answer_last()
        if self._failure() is None:
            await self._keep_listening(accepted, ends)
        left = max(0.05, ends - time.monotonic())
        self.config.timeout_graceful_shutdown = left  # type: ignore[assignment]  # a float works, too
        await super().shutdown(sockets)

    async def _wait_tasks_to_complete(self) -> None:
        try:
            await super()._wait_tasks_to_complete()
        finally:  # cancelled at the timeout; the remaining tasks are cancelled next
            self.cut_off = len(self.server_state.tasks)

    async def _keep_listening(self, accepted: set[asyncio.Task[None]], ends: float) -> None:
        """Return when these tasks are done and the delay is over, at `ends`, or at a second signal."""
        tick = 0
        while not self.force_exit and (now := time.monotonic()) < ends:
            if now >= self._listens_until and all(task.done() for task in accepted):
                return
            tick += 1
            await super().on_tick(tick)  # updates the Date header
            await asyncio.sleep(0.05)


def _within_open_files(settings: Settings) -> Settings:
    """The settings, with `max_connections` within the limit on open files."""
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
