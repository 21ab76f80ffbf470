"""Commands under signals: a server drains, a fit stops and publishes nothing."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.store import RangeStore
from tests.app.cli.conftest import Cli
from tests.processes import NEURONLENS, Running
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

TEXTS = [text for text, _ in labelled_texts(20, seed=1)]
STOPS = [signal.SIGTERM, signal.SIGINT]
ON_CPU = ("--port", "0", "--threads", "1", "--device", "cpu")

HOLD_THE_MODEL = """
import time
from pathlib import Path
from workers.models.steered import SteeredModel

def holding(call):
    def held(*args, **kwargs):
        while Path({hold!r}).exists():
            Path({reached!r}).touch()
            time.sleep(0.01)
        return call(*args, **kwargs)
    return held

SteeredModel._call, SteeredModel._call_packed = holding(SteeredModel._call), holding(SteeredModel._call_packed)
"""
"""The model answers nothing while the file `hold` exists, and creates the file `reached` when it is called."""

HOLD_THE_FIT = """
import time
import workers.fitting.fit
workers.fitting.fit.add_chunk = lambda *_: time.sleep(600)
"""
"""The fit has read its texts and never comes to an end."""

LOSE_THE_DEVICE = """
import sys

def losing(services, *args):
    def lost(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    services[0].engine.model.steered._call = lost
    return serve_until_signal(services, *args)

serve = sys.modules["app.cli.serve"]
serve_until_signal, serve.serve_until_signal = serve.serve_until_signal, losing
"""
"""The device is lost after the server has started."""


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """`start(arguments, **options)`: run a command; it is killed after the test."""
    started: list[Running] = []

    def command(*arguments: object, code: str = "", program: tuple[str, ...] = ()) -> Running:
        started.append(Running(arguments, program, {"NEURONLENS_DRAIN_SECONDS": "600"}, code))
        return started[-1]

    yield command
    for each in started:
        each.kill()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("signals") / "tiny-news")


def address_of(served: Running) -> str:
    return served.says(served.stdout, "serving tiny-news at ").split()[-1]


def test_the_installed_command_serves_until_sigterm(start: Callable[..., Running], tiny: Path, tmp_path: Path) -> None:
    served = start("serve", "--model", tiny, "--data-dir", tmp_path, *ON_CPU, program=(NEURONLENS,))
    reply = httpx.post(f"{address_of(served)}/v1/classify", json={"inputs": TEXTS}, trust_env=False, timeout=60)
    assert len(reply.json()["results"]) == len(TEXTS)
    served.process.send_signal(signal.SIGTERM)
    assert served.end() == 0
    assert "Traceback" not in "".join(served.stderr)


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_server_answers_accepted_requests_and_ends_its_redis(
    start: Callable[..., Running], tiny: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    hold, reached = tmp_path / "hold", tmp_path / "reached"
    code = HOLD_THE_MODEL.format(hold=str(hold), reached=str(reached))
    served = start("serve", "--model", tiny, "--data-dir", tmp_path, *ON_CPU, code=code)
    address = address_of(served)
    assert any("neuronlens fit" in line for line in served.stderr), "no range set is active"
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(httpx.post, f"{address}/v1/classify", json={"inputs": TEXTS}, trust_env=False, timeout=120)
        until(reached.exists)
        served.process.send_signal(stop)
        until(lambda: httpx.get(f"{address}/readyz", trust_env=False, timeout=60).status_code == 503)  # draining
        hold.unlink()
        assert len(reply.result().json()["results"]) == len(TEXTS)
    assert served.end() == 0
    assert "Traceback" not in "".join(served.stderr)
    assert not (tmp_path / "redis" / "redis.pid").exists()


def test_a_taken_port_is_an_error(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = cli("serve", "--model", tiny, "--port", port, "--data-dir", tmp_path)
    assert ended.exit_code == 1
    assert ended.stderr.count("\n") == 1
    assert f"{port} is in use" in ended.stderr


def test_a_server_without_keys_listens_on_loopback_only(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        ended = cli("serve", "--model", tiny, "--host", host, "--port", "0", "--data-dir", tmp_path)
        assert ended.exit_code == 2
        assert "--insecure" in ended.stderr


def test_serve_requires_a_model(cli: Cli) -> None:
    assert cli("serve").exit_code == 2


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_fit_says_that_it_can_resume_and_publishes_nothing(
    start: Callable[..., Running], tiny: Path, redis_client: EmbeddedRedis, tmp_path: Path, stop: signal.Signals
) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", labelled_texts(30, seed=1))
    name = f"stopped-{os.getpid()}-{stop}"
    place = ["--redis-url", redis_client.url, "--data-dir", tmp_path, "--name", name]
    options = ["--layer", "all", "--threads", "1", "--device", "cpu"]
    fitting = start("fit", "--model", tiny, "--data", data, *options, *place, code=HOLD_THE_FIT)
    fitting.says(fitting.stderr, "fitting")
    fitting.process.send_signal(stop)
    assert fitting.end() == 130
    assert "resumes" in fitting.stderr[-1]
    assert "Traceback" not in "".join(fitting.stderr)
    assert fitting.stdout == []
    assert not RangeStore(redis_client, name).range_sets.list()


def test_a_server_that_loses_its_device_reports_it_and_exits(
    start: Callable[..., Running], tiny: Path, tmp_path: Path
) -> None:
    """A supervisor can start it again; waiting requests get an error."""
    served = start("serve", "--model", tiny, "--data-dir", tmp_path, *ON_CPU, code=LOSE_THE_DEVICE)
    address = address_of(served)
    reply = httpx.post(f"{address}/v1/classify", json={"inputs": ["one", "two"]}, trust_env=False, timeout=60)
    assert (reply.status_code, reply.json()["code"]) == (500, "engine_failed")
    assert served.end() == 1
    (line,) = [line for line in served.stderr if line.startswith("error:")]
    assert "illegal memory access" in line
