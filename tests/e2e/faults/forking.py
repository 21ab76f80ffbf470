"""A process that has loaded what `neuronlens` needs, and forks a command per line of its stdin.

A fork is a process like any other, and starts at once: there is time for many to be killed. A line is the file for its
stderr, and the command's words; this process says the fork's pid, and then its exit code. Here fits write checkpoints
several times a second.
"""

import functools
import os
import shlex
import sys
import traceback

import torch

import app.wiring
from app import cli

CHECKPOINT_SECONDS = 0.1


def main() -> None:
    torch.set_num_threads(1)
    app.wiring.CHECKPOINT_SECONDS = CHECKPOINT_SECONDS  # of the command
    app.wiring._fit = functools.partial(app.wiring._fit, checkpoint_seconds=CHECKPOINT_SECONDS)  # of an evaluation
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            said, *words = shlex.split(line)
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, 0)
            os.dup2(nowhere, 1)
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            try:
                os._exit(cli.run(words))
            except BaseException:
                traceback.print_exc()
                os._exit(70)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        status = os.waitpid(pid, 0)[1]
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
