"""Commands as processes of their own, for tests that send signals or need a whole program."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis

from range_store.embedded.server import EmbeddedServer
from tests.forking import Forked, forker
from tests.range_store.waiting import until

NEURONLENS = str(Path(sys.executable).parent / "neuronlens")


def answers(client: redis.Redis) -> bool:
    """Whether Redis answers."""
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def end_redis(directory: Path) -> None:
    """End the private Redis of a directory, if there is one: a killed command leaves it running."""
    private = EmbeddedServer(directory)
    with private.locked():
        if private.running():
            private.end()


class Running:
    """A running `neuronlens` command; the lines of its output are collected as they come.

    Args:
        program: start this program with the arguments, such as `(NEURONLENS,)` for the installed command. Without it,
            the command is a fork of a process that has loaded torch, and starts at once.
        code: Python for the fork to run before the command.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        program: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        code: str = "",
    ) -> None:
        self.process: subprocess.Popen[str] | Forked
        if program:
            self.process = subprocess.Popen(
                [*program, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        else:
            self.process = forker().start(arguments, environment, code)
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,))
            for lines, stream in ((self.stdout, self.process.stdout), (self.stderr, self.process.stderr))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    def says(self, lines: list[str], words: str) -> str:
        """Wait for a line that contains `words`, and give it."""
        until(lambda: any(words in line for line in lines) or self.process.poll() is not None, 120)
        if self.process.poll() is not None:
            self.end()  # its last lines may not have been read yet
        assert any(words in line for line in lines), f"no line contains {words!r}: {self.stdout} {self.stderr}"
        return next(line for line in lines if words in line)

    def end(self) -> int:
        """Wait for its end, and give its exit code."""
        code = self.process.wait(120)
        for reader in self._readers:
            reader.join()
        return code

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.end()
