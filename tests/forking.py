"""Commands as processes of their own that start at once: forks of a process that has torch and the product loaded.

Loading takes seconds of a core; tests that start many servers and fits pay it once per test process. A fork is a
process like any other: it has its own arguments, environment, directory, streams, signals and end.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

MESSAGE_BYTES = 1 << 17


class Forked:
    """A process under way, with the parts of `subprocess.Popen` that the tests use."""

    def __init__(self, pid: int, status: int, stdout: IO[str], stderr: IO[str]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; gives the exit code, or minus the signal that killed it."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._status], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
                said = os.read(self._status, 16)
                os.close(self._status)
                assert said, "the process that forks is gone"
                self.returncode = int(said)
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
    """The process that is loaded, as its user sees it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        self._lock = threading.Lock()
        with theirs:
            quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}  # as the command sets them
            quiet |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forking", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[object], environment: Mapping[str, str] | None = None, code: str = ""
    ) -> Forked:
        """Run `neuronlens` with these arguments.

        Args:
            environment: variables beside those of this process.
            code: Python to run first in the new process; it may replace parts of the product, or end the process.
        """
        request = {
            "arguments": [str(each) for each in arguments],
            "environment": {**os.environ, **(environment or {})},
            "directory": os.getcwd(),
            "code": code,
        }
        out, their_out = os.pipe()
        err, their_err = os.pipe()
        status, their_status = os.pipe()
        theirs = [their_out, their_err, their_status]
        with self._lock:
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], theirs)
            finally:
                for each in theirs:
                    os.close(each)
            pid = int(self._socket.recv(16))
        return Forked(pid, status, os.fdopen(out, "r", encoding="utf-8"), os.fdopen(err, "r", encoding="utf-8"))

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


@functools.cache
def forker() -> Forker:
    """The forker of this process, started when first asked for."""
    return Forker()


def _load() -> None:
    import torch
    from transformers import BertForSequenceClassification  # noqa: F401  loaded when first used

    import app.cli.serve
    import app.wiring  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _become(request: dict[str, object], out: int, err: int) -> None:
    """Turn this fork into the process that was asked for, up to its command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(err, 2)
    environment, arguments = request["environment"], request["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["directory"]))
    sys.argv = ["neuronlens", *arguments]


def _main(connection: socket.socket) -> None:
    """Fork for each request until its user has gone; the exit code of a fork goes to the pipe that came with it."""
    _load()
    ends: dict[int, int] = {}
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        ready, _, _ = select.select([connection, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 512)
            for pid in list(ends):
                if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    status = ends.pop(pid)
                    with suppress(BrokenPipeError):
                        os.write(status, str(os.waitstatus_to_exitcode(ended[1])).encode())
                    os.close(status)
        if connection not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        if not message:
            return
        out, err, status = descriptors
        request = json.loads(message)
        pid = os.fork()
        if pid == 0:
            _become(request, out, err)
            for each in (connection.detach(), out, err, status, wake_read, wake_write, *ends.values()):
                os.close(each)
            if request["code"]:
                exec(compile(request["code"], "<code of the test>", "exec"), {"__name__": "__test__"})
            from app.cli import main

            main()
            raise SystemExit(0)
        os.close(out)
        os.close(err)
        ends[pid] = status
        connection.send(str(pid).encode())


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
