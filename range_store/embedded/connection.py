"""Connecting to Redis: to one by URL, or to the private, persistent one of a directory (DESIGN "The store")."""

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
"""Seconds that Redis may be silent, before or within an answer. However large an answer is, it comes in pieces, so this
bounds what a Redis that hangs costs a caller, and no read."""
TRANSFER_TIMEOUT = 30.0
"""Seconds for a client that publishes: here the largest part of a range set must be taken, and written to disk."""
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
    """A client of the Redis at `url` (redis://, rediss:// or unix://), or, without one, of the one in `directory`.

    A URL is not tried before its first use, so that a service can start while Redis is away. Close the client when
    done; it is a context manager. A user, password or `ssl_ca_certs` in the URL counts more than these.

    Args:
        ca_file: certificates (PEM) that a rediss:// server's is checked against; None: the system's.
        timeout: seconds that Redis may be silent; `TRANSFER_TIMEOUT` for who publishes range sets.

    Raises:
        InvalidStoreAddress: no such URL, or no such file of certificates.
        StoreUnavailable: the embedded Redis cannot be started.
    """
    if not url:
        return EmbeddedRedis.open(directory, timeout)
    given: dict[str, Any] = {"username": username, "password": password}
    if url.startswith("rediss://"):
        if ca_file is not None and not ca_file.is_file():
            raise InvalidStoreAddress(f"NEURONLENS_REDIS_CA_FILE: {ca_file} is no file")
        given["ssl_ca_certs"] = str(ca_file) if ca_file else None
    try:
        return redis.Redis.from_url(
            url,
            client_name="neuronlens",
            protocol=2,
            **{name: value for name, value in given.items() if value is not None},
            **_patience(timeout),
        )
    except (ValueError, redis.RedisError):  # not quoted: the URL may hold a password
        raise InvalidStoreAddress(
            "NEURONLENS_REDIS_URL is no Redis URL: it must be like redis://host:6379/0, rediss://… or unix:///path"
        ) from None


class EmbeddedRedis(redis.Redis):
    """A client of a directory's private server, which lives while somebody uses it.

    Processes share the server: the first starts it, the last to `close` shuts it down. A user that was killed leaves it
    running for the next to join. A server that died is started again by whoever next connects to it.
    """

    def __init__(self, server: EmbeddedServer, path: Path, timeout: float = ANSWER_TIMEOUT) -> None:
        self._server = server
        self._closed = False
        self._name = f"neuronlens-{os.getpid()}-{secrets.token_hex(4)}"
        pool = redis.ConnectionPool(
            connection_class=_RevivingConnection,
            path=str(path),
            revive=self._revive,
            last_words=self._server.last_words,
            client_name=self._name,
            protocol=2,
            **_patience(timeout),
        )
        super().__init__(connection_pool=pool)

    def __repr__(self) -> str:
        return f"EmbeddedRedis({str(self.directory)!r})"

    @classmethod
    def open(cls, directory: Path, timeout: float = ANSWER_TIMEOUT) -> "EmbeddedRedis":
        """Start the server of `directory`, or join it.

        Raises:
            StoreUnavailable: the directory cannot be used, or the server does not start; says why.
        """
        server = EmbeddedServer(directory)
        with server.locked():
            client = cls(server, server.ensure(), timeout)
            with translate_redis_errors():
                client.ping()  # its connection stays open: it tells others that the server is in use
        return client

    @property
    def directory(self) -> Path:
        """Where the data lie."""
        return self._server.directory

    @property
    def url(self) -> str:
        """For another client of the same server. A connection by URL keeps the server running too."""
        return f"unix://{quote(str(self._server.socket))}"

    def close(self) -> None:
        """Leave; the last to leave shuts the server down. What was written stays on disk."""
        if self._closed:
            return
        self._closed = True
        self.connection_pool.disconnect()
        with suppress(StoreUnavailable), self._server.locked():  # left running, the next user joins or ends it
            self._server.end_if_unused(self._name)

    def __del__(self) -> None:
        with suppress(Exception):  # never shut a server down from a destructor
            self.connection_pool.disconnect()

    def _revive(self) -> str | None:
        if self._closed:
            return None
        with self._server.locked():
            return str(self._server.ensure())


class _RevivingConnection(redis.UnixDomainSocketConnection):
    """Starts the server again if nobody listens at its socket; if it died while it answered, says why."""

    def __init__(
        self, *args: Any, revive: Callable[[], str | None], last_words: Callable[[], str | None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._revive, self._last_words = revive, last_words

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except redis.ConnectionError as error:
            if why := self._last_words():
                raise redis.ConnectionError(why) from error
            raise

    def _connect(self) -> Any:
        try:
            return super()._connect()  # type: ignore[no-untyped-call]
        except (ConnectionRefusedError, FileNotFoundError):
            try:
                path = self._revive()
            except StoreUnavailable as error:
                raise redis.ConnectionError(str(error)) from error
            if path is None:
                raise
            self.path = path
            return super()._connect()  # type: ignore[no-untyped-call]


def _patience(timeout: float) -> dict[str, Any]:
    # A cut connection is tried once more: that is how a Redis that was started again is met. A silent one is not, for
    # whoever asked has waited long enough.
    retry = Retry(ExponentialBackoff(cap=0.1, base=0.02), 1, supported_errors=(redis.ConnectionError,))
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "health_check_interval": HEALTH_CHECK_INTERVAL,
        "retry": retry,
    }
