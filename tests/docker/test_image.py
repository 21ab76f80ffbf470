"""The image without Docker: bubblewrap gives its user, environment and read-only root."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.docker.conftest import ROOT
from tests.docker.image import health_check, instructions, sandboxed, send_signal
from tests.ports import free_port
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

TIMEOUT = 120.0
WRITES = """
import os, sys
print(os.getuid(), os.getpid())
for place in sys.argv[1:]:
    try:
        print(open(place + "/written", "w"))
    except OSError as error:
        print(error.strerror)
"""
DEVELOPMENT = Path(sys.prefix).resolve()
"""The virtual environment of the tests, which has the packages of the image and more."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The volume at /data: empty, owned by the image's user."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o750)
    if os.geteuid() == 0:
        os.chown(directory, 10001, 10001)
    return directory


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a corpus, readable by everybody."""
    directory = tmp_path_factory.mktemp("files")
    save_tiny("bert", directory / "model")
    write_jsonl(directory / "train.jsonl", labelled_texts(60, seed=4))
    for each in (directory, *directory.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    return directory


@pytest.fixture
def running(data: Path, files: Path) -> Iterator[Callable[..., "Running"]]:
    """`running(venv)`: start the image's command."""
    with ExitStack() as stack:

        def start(venv: Path, **environment: str) -> Running:
            served = Running(venv, data, files, environment)
            stack.callback(served.end)
            return served

        yield start


class Running:
    """The container's process, and further commands on the same volume."""

    def __init__(self, venv: Path, data: Path, files: Path, environment: dict[str, str]) -> None:
        self._where = (venv, data, files)
        self.environment = {"NEURONLENS_PORT": str(free_port()), "NEURONLENS_MODEL": "/files/model", **environment}
        self.url = f"http://127.0.0.1:{self.environment['NEURONLENS_PORT']}"
        words = {word: argument for word, argument in instructions() if word in ("ENTRYPOINT", "CMD")}
        self._entry = [*json.loads(words["ENTRYPOINT"]), *json.loads(words["CMD"])]
        self.process = subprocess.Popen(self.command(self._entry), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def command(self, command: list[str]) -> list[str]:
        return sandboxed(command, *self._where, self.environment)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command([*command]), capture_output=True, text=True, timeout=TIMEOUT)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.stdout.read().decode() if self.process.stdout else ""
        try:
            return httpx.get(f"{self.url}/livez").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Send SIGTERM to process 1, as Docker does; returns the exit code."""
        send_signal(self.process, signal.SIGTERM)
        return self.process.wait(TIMEOUT)

    def end(self) -> None:
        send_signal(self.process, signal.SIGKILL)
        self.process.wait()


def check_health(running: Running) -> None:
    elsewhere = running.run("env", f"NEURONLENS_PORT={free_port()}", *health_check())
    assert elsewhere.returncode != 0, "healthy although nothing listens"
    until(running.answers, TIMEOUT)
    assert running.run(*health_check()).returncode == 0


def serve_and_stop(running: Running) -> None:
    """Check the server from an empty volume to a classification and a clean stop."""
    check_health(running)
    assert httpx.get(f"{running.url}/readyz").status_code == 503, (
        "nothing is fitted yet; the container is healthy all the same"
    )
    refused = httpx.get(f"{running.url}/v1/models")
    assert (refused.status_code, refused.json()["code"]) == (503, "keys_unavailable"), (
        "nobody has access before the first key"
    )
    made = running.run("neuronlens", "keys", "create", "first", "--scope", "admin")
    assert made.returncode == 0, made.stderr
    fit = ("neuronlens", "fit", "--model", "/files/model", "--data", "/files/train.jsonl", "--activate")
    fitted = running.run(*fit)
    assert fitted.returncode == 0, fitted.stderr
    until(lambda: httpx.get(f"{running.url}/readyz", timeout=TIMEOUT).status_code == 200, TIMEOUT)
    key = {"Authorization": f"Bearer {made.stdout.strip()}"}
    with httpx.Client(base_url=running.url, headers=key, timeout=TIMEOUT) as http:
        until(lambda: http.get("/v1/models").status_code == 200)
        answer = http.post("/v1/classify", json={"inputs": "The striker scored twice.", "erase": ["Sports"]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["erasure"]["concepts"] == ["Sports"]
    assert running.stop() == 0


@pytest.mark.system
def test_image_is_healthy_and_writes_only_to_data_and_tmp(running: Callable[..., Running], data: Path) -> None:
    served = running(DEVELOPMENT, PYTHONPATH=str(ROOT))
    check_health(served)
    assert served.stop() == 0
    assert {each.name for each in data.iterdir()} <= {"neuronlens", "huggingface", "cache"}
    assert (data / "neuronlens" / "redis").is_dir(), "the embedded store is in the volume"
    places = ["/", "/usr", "/etc", "/files", str(ROOT), str(DEVELOPMENT)]
    written = served.run("python", "-c", WRITES, *places)
    assert written.stdout.split("\n")[:-1] == ["10001 1", *("Read-only file system" for _ in places)], written.stderr


@pytest.mark.full
def test_the_steps_of_the_build_stage_make_an_environment_thatserve_and_stop(
    running: Callable[..., Running], tmp_path: Path
) -> None:
    """The steps run in an empty directory that holds only the build context."""
    source, venv = tmp_path / "src", tmp_path / "neuronlens"
    source.mkdir()
    (extras,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("EXTRAS=")]
    environment = {**_bare(), "EXTRAS": extras.removeprefix("EXTRAS=").strip('"')}
    steps = []
    for word, argument in instructions():
        if word == "COPY" and not argument.startswith("--from"):
            *copied, _ = argument.split()
            for path in (ROOT / each for each in copied):
                if path.is_dir():
                    shutil.copytree(path, source / path.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy2(path, source)
        if word == "RUN" and argument.startswith("./install.sh"):
            steps.append(argument.replace("/opt/neuronlens", str(venv)).split())
            run = subprocess.run(steps[-1], cwd=source, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert [step[1] for step in steps] == ["dependencies", "package"]
    serve_and_stop(running(venv))


def _bare() -> dict[str, str]:
    """The environment variables without those that lead to this project; python3 is the tests' interpreter."""
    base = Path(sys.base_prefix) / "bin"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PATH": f"{base}:{os.defpath}", "PIP_NO_CACHE_DIR": "1"}
