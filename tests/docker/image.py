"""What the Dockerfile says, instruction by instruction, and a command run as its container would run it."""

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from tests.docker.conftest import DOCKER, ROOT, system_program


def instructions() -> list[tuple[str, str]]:
    """(word, argument) of every instruction, with continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines()]
    return [(word, argument.strip()) for word, argument in found]


def variables() -> dict[str, str]:
    """The environment of the image."""
    found: dict[str, str] = {}
    stage = ""
    for word, argument in instructions():
        if word == "FROM":
            stage = argument.split()[-1]
        if word == "ENV" and stage == "runtime":
            found |= dict(each.split("=", 1) for each in shlex.split(argument))
    return found


def health_check() -> list[str]:
    """The command that tells whether the container is healthy."""
    (argument,) = [argument for word, argument in instructions() if word == "HEALTHCHECK"]
    command = json.loads(argument.split("CMD", 1)[1])
    assert isinstance(command, list)
    return [str(each) for each in command]


def sandboxed(command: list[str], venv: Path, data: Path, files: Path, environment: dict[str, str]) -> list[str]:
    """`command` as it runs in the container: as user 10001, without capabilities, everything read-only but /data, /tmp.

    The root is this machine's /usr and /etc, the environment `venv` (in the container, /opt/neuronlens) and this
    project, which a development environment imports from its place; the network is this machine's.
    """
    read_only = [Path(each) for each in ("/usr", "/etc", "/bin", "/lib", "/lib64", "/sbin") if Path(each).exists()]
    read_only += [Path(os.path.realpath(venv / "bin" / "python")).parents[1], ROOT, venv]
    within = {**variables(), **environment}
    within["PATH"] = f"{venv}/bin:/usr/bin:/bin"
    options = ["--die-with-parent", "--unshare-pid", "--as-pid-1", "--unshare-ipc", "--clearenv", "--tmpfs", "/"]
    options += ["--tmpfs", "/tmp", "--chmod", "1777", "/tmp"]
    for each in dict.fromkeys(read_only):
        for parent in reversed(each.parents[:-1]):  # else only root could pass through them
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(each), str(each)]
    options += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm"]
    options += ["--bind", str(data), "/data", "--ro-bind", str(files), "/files", "--remount-ro", "/", "--chdir", "/tmp"]
    options += [word for name, value in within.items() for word in ("--setenv", name, value)]
    if os.geteuid() != 0:  # then the user is 10001 only to itself
        return [system_program("bwrap"), *options, "--unshare-user", "--uid", "10001", "--gid", "10001", *command]
    become = ["--reuid=10001", "--regid=10001", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    return [system_program("bwrap"), *options, system_program("setpriv"), *become, *command]


def signalled(container: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to process 1 of what `sandboxed` started; SIGKILL ends all that runs in it.

    Ending bwrap itself would not: who becomes another user loses the wish to die with its parent.
    """
    if container.poll() is None:
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        os.kill(int(children[0]) if children else container.pid, number)
