"""The instructions of the Dockerfile, and a sandbox that runs a command as its container would."""

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from tests.docker.conftest import DOCKER, ROOT, system_program


def instructions() -> list[tuple[str, str]]:
    """(keyword, argument) of every instruction, with continued lines joined."""
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
    """The command of the HEALTHCHECK instruction."""
    (argument,) = [argument for word, argument in instructions() if word == "HEALTHCHECK"]
    command = json.loads(argument.split("CMD", 1)[1])
    assert isinstance(command, list)
    return [str(each) for each in command]


def sandboxed(command: list[str], venv: Path, data: Path, files: Path, environment: dict[str, str]) -> list[str]:
    """The command as the container runs it: user 10001, no capabilities, only /data and /tmp writable.

    The root holds this machine's /usr and /etc, the virtual environment `venv` (/opt/neuronlens in the container) and
    this project, which an editable installation imports. The network is this machine's.
    """
    read_only = [Path(each) for each in ("/usr", "/etc", "/bin", "/lib", "/lib64", "/sbin") if Path(each).exists()]
    read_only += [Path(os.path.realpath(venv / "bin" / "python")).parents[1], ROOT, venv]
    within = {**variables(), **environment}
    within["PATH"] = f"{venv}/bin:/usr/bin:/bin"
    options = ["--die-with-parent", "--unshare-pid", "--as-pid-1", "--unshare-ipc", "--clearenv", "--tmpfs", "/"]
    options += ["--tmpfs", "/tmp", "--chmod", "1777", "/tmp"]
    for each in dict.fromkeys(read_only):
        for parent in reversed(each.parents[:-1]):  # otherwise only root could enter them
            options += ["--perms", "0755", "--dir", str(parent)]
        options += ["--ro-bind", str(each), str(each)]
    options += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/dev/shm"]
    options += ["--bind", str(data), "/data", "--ro-bind", str(files), "/files", "--remount-ro", "/", "--chdir", "/tmp"]
    options += [word for name, value in within.items() for word in ("--setenv", name, value)]
    if os.geteuid() != 0:  # user 10001 inside the namespace only
        return [system_program("bwrap"), *options, "--unshare-user", "--uid", "10001", "--gid", "10001", *command]
    become = ["--reuid=10001", "--regid=10001", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
    return [system_program("bwrap"), *options, system_program("setpriv"), *become, *command]


def send_signal(container: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to process 1 of the sandbox; SIGKILL ends every process in it.

    Ending bwrap itself would not: changing the user clears the parent-death signal.
    """
    if container.poll() is None:
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        os.kill(int(children[0]) if children else container.pid, number)
