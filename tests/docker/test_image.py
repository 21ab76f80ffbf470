"""The image's promises without an image: the same user, environment and read-only root, by bubblewrap."""

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
from tests.docker.image import health_check, instructions, sandboxed, signalled
from tests.ports import free_port
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

pytestmark = pytest.mark.system

Sandbox = Callable[..., list[str]]
SOON = 120.0
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
"""The environment that the tests run in: the packages of the image and some more."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What the volume at /data is: empty, and the user's."""
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
    """`running(venv)`: the image's own command, serving."""
    with ExitStack() as stack:

        def start(venv: Path, **environment: str) -> Running:
            served = Running(venv, data, files, environment)
            stack.callback(served.end)
            return served

        yield start


class Running:
    """The container's process, and others beside it in the same volume."""

    def __init__(self, venv: Path, data: Path, files: Path, environment: dict[str, str]) -> None:
        self._where = (venv, data, files)
        self.environment = {"NEURONLENS_PORT": str(free_port()), "NEURONLENS_MODEL": "/files/model", **environment}
        self.url = f"http://127.0.0.1:{self.environment['NEURONLENS_PORT']}"
        words = {word: argument for word, argument in instructions() if word in ("ENTRYPOINT", "CMD")}
        self._entry = [*eval(words["ENTRYPOINT"]), *eval(words["CMD"])]
        self.process = subprocess.Popen(self.command(self._entry), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def command(self, command: list[str]) -> list[str]:
        return sandboxed(command, *self._where, self.environment)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command([*command]), capture_output=True, text=True, timeout=SOON)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.stdout.read().decode() if self.process.stdout else ""
        try:
            return httpx.get(f"{self.url}/livez").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """As Docker does: SIGTERM to process 1 of the container. Gives its exit status."""
        signalled(self.process, signal.SIGTERM)
        return self.process.wait(SOON)

    def end(self) -> None:
        signalled(self.process, signal.SIGKILL)
        self.process.wait()


def _serves(running: Running) -> None:
    """From an empty volume to an answer, and a clean end."""
    elsewhere = running.run("env", f"NEURONLENS_PORT={free_port()}", *health_check())
    assert elsewhere.returncode != 0, "not healthy where nothing answers"
    until(running.answers, SOON)
    assert running.run(*health_check()).returncode == 0
    assert httpx.get(f"{running.url}/readyz").status_code == 503, "nothing is fitted, and yet the container is healthy"
    refused = httpx.get(f"{running.url}/v1/models")
    assert (refused.status_code, refused.json()["code"]) == (503, "keys_unavailable"), "before the first key, nobody"
    made = running.run("neuronlens", "keys", "create", "first", "--scope", "admin")
    assert made.returncode == 0, made.stderr
    fit = ("neuronlens", "fit", "--model", "/files/model", "--data", "/files/train.jsonl", "--activate")
    fitted = running.run(*fit)
    assert fitted.returncode == 0, fitted.stderr
    until(lambda: httpx.get(f"{running.url}/readyz", timeout=SOON).status_code == 200, SOON)
    key = {"Authorization": f"Bearer {made.stdout.strip()}"}
    with httpx.Client(base_url=running.url, headers=key, timeout=SOON) as http:
        until(lambda: http.get("/v1/models").status_code == 200)
        answer = http.post("/v1/classify", json={"inputs": "The striker scored twice.", "erase": ["Sports"]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["erasure"]["concepts"] == ["Sports"]
    assert running.stop() == 0


def test_it_serves_with_everything_read_only_but_data_and_tmp(running: Callable[..., Running], data: Path) -> None:
    served = running(DEVELOPMENT, PYTHONPATH=str(ROOT))
    _serves(served)
    assert {each.name for each in data.iterdir()} <= {"neuronlens", "huggingface", "cache"}
    assert (data / "neuronlens" / "redis").is_dir(), "the store without a URL is in the volume"
    places = ["/", "/usr", "/etc", "/files", str(ROOT), str(DEVELOPMENT)]
    told = served.run("python", "-c", WRITES, *places)
    assert told.stdout.split("\n")[:-1] == ["10001 1", *("Read-only file system" for _ in places)], told.stderr


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_steps_of_the_build_stage_make_an_environment_that_serves(
    running: Callable[..., Running], tmp_path: Path
) -> None:
    """In an empty directory, from just the build context."""
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
                    shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy2(path, source)
        if word == "RUN" and argument.startswith("./install.sh"):
            steps.append(argument.replace("/opt/neuronlens", str(venv)).split())
            run = subprocess.run(steps[-1], cwd=source, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert [step[1] for step in steps] == ["dependencies", "package"]
    _serves(running(venv))


def _bare() -> dict[str, str]:
    """This environment, but for what leads to this project; python3 is the one that the tests run on."""
    base = Path(sys.base_prefix) / "bin"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PATH": f"{base}:{os.defpath}", "PIP_NO_CACHE_DIR": "1"}
