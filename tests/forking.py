"""Commands as processes of their own that start at once: forks of a process that has torch and the product loaded.

Loading takes seconds of a core; tests that start many servers and fits pay it once per test process. A fork is a
process like any other: it has its own arguments, environment, directory, streams, signals and exit code.
"""

import atexit
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

MESSAGE_BYTES = 1 << 17


class Forked:
    """A running process, with the parts of `subprocess.Popen` that are used."""

    def __init__(
        self, pid: int, status: int, stdout: IO[str] | None, stderr: IO[str] | None, stdin: IO[bytes] | None = None
    ) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; gives the exit code, or minus the signal that killed it."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._status], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
                status = os.read(self._status, 16)
                os.close(self._status)
                assert status, "the process that forks is gone"
                self.returncode = int(status)
            return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forker:
    """The process that is loaded and forks."""

    def __init__(self) -> None:
        self.address = f"\0neuronlens-tests-{uuid.uuid4().hex}"
        """Any process of this machine may ask for a fork here; an abstract address leaves no file."""
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}  # as the command sets them
        quiet |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forking", str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,  # the forker ends when this process does
                stdout=subprocess.DEVNULL,
                env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[1],
            )
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[object], environment: Mapping[str, str] | None = None, code: str = ""
    ) -> Forked:
        """Run `neuronlens` with these arguments.

        Args:
            environment: variables in addition to those of this process.
            code: Python to run first in the new process; it may replace parts of the product, or end the process.
        """
        out, their_out = os.pipe()
        err, their_err = os.pipe()
        with open(os.devnull, "rb") as nothing:
            try:
                streams = (nothing.fileno(), their_out, their_err)
                pid, status = _fork(self.address, arguments, {**os.environ, **(environment or {})}, code, streams)
            finally:
                os.close(their_out)
                os.close(their_err)
        return Forked(pid, status, os.fdopen(out, "r", encoding="utf-8"), os.fdopen(err, "r", encoding="utf-8"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class ForkedFits:
    """Stands in for the module `subprocess` in `app.jobs.process`: the fits of a server become forks.

    They get the arguments, environment, streams and process group that a real start gives them.

    Args:
        address: of a forker.
        code: for each fit to run first.
    """

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self, address: str, code: str = "") -> None:
        self._address, self._code = address, code
        self.commands: list[list[str]] = []
        """The command of each fit that was started."""

    def Popen(  # noqa: N802  the name of what it stands in for
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: IO[bytes],
        env: Mapping[str, str],
        process_group: int,
    ) -> Forked:
        assert list(command[:4]) == [sys.executable, "-P", "-m", "app.cli"], "start `neuronlens` as the forks do"
        assert (stdin, stdout, process_group) == (subprocess.PIPE, subprocess.PIPE, 0)
        self.commands.append(list(command))
        their_stdin, held = os.pipe()
        out, their_stdout = os.pipe()
        try:
            streams = (their_stdin, their_stdout, stderr.fileno())
            pid, status = _fork(self._address, command[4:], env, self._code, streams, own_group=True)
        except BaseException:
            os.close(held)
            os.close(out)
            raise
        finally:
            os.close(their_stdin)
            os.close(their_stdout)
        return Forked(pid, status, os.fdopen(out, "r", encoding="utf-8"), None, os.fdopen(held, "wb"))


def _fork(
    address: str,
    arguments: Sequence[object],
    environment: Mapping[str, str],
    code: str,
    streams: tuple[int, int, int],
    own_group: bool = False,
) -> tuple[int, int]:
    """Ask for a fork; gives its pid and the descriptor that its exit code comes from."""
    request = {
        "arguments": [str(each) for each in arguments],
        "environment": dict(environment),
        "directory": os.getcwd(),
        "code": code,
        "own_group": own_group,
    }
    status, their_status = os.pipe()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
            connection.connect(address)
            socket.send_fds(connection, [json.dumps(request).encode()], [their_status, *streams])
            pid = int(connection.recv(16))
    except BaseException:
        os.close(status)
        raise
    finally:
        os.close(their_status)
    return pid, status


@functools.cache
def forker() -> Forker:
    """The forker of this process, started when first asked for."""
    return Forker()


def _load() -> None:
    import torch
    from transformers import BertForSequenceClassification  # noqa: F401  loaded when first used

    import app.cli.serve
    import app.serving.evaluate
    import app.serving.serve
    import app.serving.train  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Turn this fork into the process that was asked for, up to its command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["own_group"]:
        os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.argv = ["neuronlens", *request["arguments"]]


def _main(listener: socket.socket) -> None:
    """Fork for each request until stdin is closed; the exit code of a fork goes to the pipe that came with it."""
    _load()
    ends: dict[int, int] = {}
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        sources: list[Any] = [listener, wake_read, 0]
        ready, _, _ = select.select(sources, [], [])
        if 0 in ready:
            return
        if wake_read in ready:
            os.read(wake_read, 512)
            for pid in list(ends):
                if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    status = ends.pop(pid)
                    with suppress(BrokenPipeError):
                        os.write(status, str(os.waitstatus_to_exitcode(ended[1])).encode())
                    os.close(status)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 8)
        if not message:  # the process that asked has ended
            connection.close()
            continue
        status, *streams = descriptors
        request = json.loads(message)
        pid = os.fork()
        if pid == 0:
            _become(request, streams)
            for each in (connection.detach(), listener.detach(), status, wake_read, wake_write, *ends.values()):
                os.close(each)
            if request["code"]:
                exec(compile(request["code"], "<code of the test>", "exec"), {"__name__": "__test__"})
            from app.cli import main

            main()
            raise SystemExit(0)
        for each in streams:
            os.close(each)
        ends[pid] = status
        with suppress(BrokenPipeError):
            connection.send(str(pid).encode())
        connection.close()


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
