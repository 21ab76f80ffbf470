"""Connects to Redis: to a server by URL, or to the private, persistent server of a directory."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from range_store.embedded.server import EmbeddedServer
from range_store.errors import InvalidStoreAddress, StoreUnavailable
from range_store.redis_errors import translate_redis_errors

ANSWER_TIMEOUT = 2.0
"""Seconds without data from Redis after which a call fails. Large replies arrive in pieces, so this limits how long a
Redis that hangs blocks a caller, but not the duration of a read."""
TRANSFER_TIMEOUT = 30.0
"""The same for a client that publishes: Redis writes the largest part of a range set to disk before it replies."""
CONNECT_TIMEOUT = 2.0
HEALTH_CHECK_INTERVAL = 15


def connect(
    url: str | None,
    directory: Path,
    *,
    username: str | None = None,
    password: str | None = None,
    ca_file: Path | None = None,
    timeout: float = ANSWER_TIMEOUT,
) -> redis.Redis:
    """Return a client of the Redis at `url` (redis://, rediss:// or unix://), or of the private one in `directory`.

    A client by URL connects at its first call, so a service can start while Redis is away. Close the client when done;
    it is a context manager. A user, password or `ssl_ca_certs` in the URL takes precedence over the arguments.

    Args:
        ca_file: trusted certificates (PEM) for rediss://; None: the system's.
        timeout: seconds without data after which a call fails; use `TRANSFER_TIMEOUT` to publish range sets.

    Raises:
        InvalidStoreAddress: the URL is invalid, or there is no such file of certificates.
        StoreUnavailable: the private Redis cannot be started.
    """
    if not url:
        return EmbeddedRedis.open(directory, timeout)
    given: dict[str, Any] = {"username": username, "password": password}
    if url.startswith("rediss://"):
        if ca_file is not None and not ca_file.is_file():
            raise InvalidStoreAddress(f"NEURONLENS_REDIS_CA_FILE: no file {ca_file}: name a file of certificates (PEM)")
        given["ssl_ca_certs"] = str(ca_file) if ca_file else None
    try:
        return redis.Redis.from_url(
            url,
            client_name="neuronlens",
            protocol=2,
            **{name: value for name, value in given.items() if value is not None},
            **_timeouts(timeout),
        )
    except (ValueError, redis.RedisError):  # without the URL, which may contain a password
        raise InvalidStoreAddress(
            "NEURONLENS_REDIS_URL is not a Redis URL: expected redis://host:6379/0, rediss://… or unix:///path"
        ) from None


class EmbeddedRedis(redis.Redis):
    """A client of a directory's private server, which runs while clients use it.

    Processes share the server: the first one starts it, and the last to `close` shuts it down. A killed process leaves
    it running for the next one. A client that finds the server dead starts it again.
    """

    def __init__(self, server: EmbeddedServer, path: Path, timeout: float = ANSWER_TIMEOUT) -> None:
        self._server = server
        self._closed = False
        self._name = f"neuronlens-{os.getpid()}-{secrets.token_hex(4)}"
        pool = redis.ConnectionPool(
            connection_class=_RestartingConnection,
            path=str(path),
            restart=self._restart,
            failure_reason=self._server.failure_reason,
            client_name=self._name,
            protocol=2,
            **_timeouts(timeout),
        )
        super().__init__(connection_pool=pool)

    def __repr__(self) -> str:
        return f"EmbeddedRedis({str(self.directory)!r})"

    @classmethod
    def open(cls, directory: Path, timeout: float = ANSWER_TIMEOUT) -> "EmbeddedRedis":
        """Start the server of `directory`, or join it.

        Raises:
            StoreUnavailable: the directory cannot be used, or the server does not start.
        """
        server = EmbeddedServer(directory)
        with server.locked():
            client = cls(server, server.ensure(), timeout)
            with translate_redis_errors():
                client.ping()  # this connection stays open and shows other processes that the server is in use
        return client

    @property
    def directory(self) -> Path:
        """Where the data is stored."""
        return self._server.directory

    @property
    def url(self) -> str:
        """URL for another client of this server. A connection by URL keeps the server running too."""
        return f"unix://{quote(str(self._server.socket))}"

    def close(self) -> None:
        """Disconnect; the last client shuts the server down. The data stays on disk."""
        if self._closed:
            return
        self._closed = True
        self.connection_pool.disconnect()
        with suppress(StoreUnavailable), self._server.locked():  # if it keeps running, the next user joins or ends it
            self._server.end_if_unused(self._name)

    def __del__(self) -> None:
        with suppress(Exception):  # never shut a server down from a destructor
            self.connection_pool.disconnect()

    def _restart(self) -> str | None:
        if self._closed:
            return None
        with self._server.locked():
            return str(self._server.ensure())


class _RestartingConnection(redis.UnixDomainSocketConnection):
    """Starts the server again if nothing listens on its socket. If it died during a reply, the error says why."""

    def __init__(
        self, *args: Any, restart: Callable[[], str | None], failure_reason: Callable[[], str | None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._restart, self._failure_reason = restart, failure_reason

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.ConnectionError as error:
            if why := self._failure_reason():
                raise redis.ConnectionError(why) from error
            raise

    def _connect(self) -> Any:
        try:
            return super()._connect()  # type: ignore[no-untyped-call]
        except (ConnectionRefusedError, FileNotFoundError):
            try:
                path = self._restart()
            except StoreUnavailable as error:
                raise redis.ConnectionError(str(error)) from error
            if path is None:
                raise
            self.path = path
            return super()._connect()  # type: ignore[no-untyped-call]


def _timeouts(timeout: float) -> dict[str, Any]:
    # A lost connection is retried once, in case Redis was restarted; a timeout is not, as the caller has waited enough.
    retry = Retry(ExponentialBackoff(cap=0.1, base=0.02), 1, supported_errors=(redis.ConnectionError,))
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "health_check_interval": HEALTH_CHECK_INTERVAL,
        "retry": retry,
    }
