"""The installed command under signals: a server drains, a fit stops and leaves nothing behind."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from range_store.embedded import EmbeddedRedis
from range_store.store import RangeStore
from tests.app.cli.conftest import Cli
from tests.processes import Running
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def command(*arguments: object) -> Running:
        started.append(Running(arguments))
        return started[-1]

    yield command
    for each in started:
        each.kill()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("signals") / "tiny-news")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_server_answers_what_it_accepted_and_leaves_nothing(
    start: Callable[..., Running], tiny: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    served = start("serve", "--model", tiny, "--port", "0", "--data-dir", tmp_path, "--threads", "1", "--device", "cpu")
    address = served.says(served.stdout, "serving tiny-news at ").split()[-1]
    until(lambda: any("neuronlens fit" in line for line in served.stderr))  # nothing is fitted yet
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/livez").status_code == 200
        texts = [text for text, _ in labelled_texts(1000, seed=1)]
        answer = pool.submit(client.post, "/v1/classify", json={"inputs": texts})
        until(lambda: _metric(address, "neuronlens_forward_seconds_count") >= 1)
        served.process.send_signal(stop)
        assert len(answer.result().json()["results"]) == len(texts)
    assert served.end() == 0
    assert "Traceback" not in "".join(served.stderr)
    assert not (tmp_path / "redis" / "redis.pid").exists()


def _metric(address: str, name: str) -> float:
    reply = httpx.get(f"{address}/metrics", trust_env=False, timeout=60)
    assert reply.status_code == 200, reply.text
    lines = reply.text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_taken_port_is_known_at_once(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = cli("serve", "--model", tiny, "--port", port, "--data-dir", tmp_path)
    assert ended.exit_code == 1
    assert ended.stderr.count("\n") == 1
    assert f"{port} is taken" in ended.stderr


def test_a_server_without_keys_stays_on_this_machine(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        ended = cli("serve", "--model", tiny, "--host", host, "--port", "0", "--data-dir", tmp_path)
        assert ended.exit_code == 2
        assert "--insecure" in ended.stderr


def test_a_server_needs_a_model(cli: Cli) -> None:
    assert cli("serve").exit_code == 2


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_fit_that_is_stopped_says_that_it_resumes_and_publishes_nothing(
    start: Callable[..., Running], tiny: Path, redis_client: redis.Redis, tmp_path: Path, stop: signal.Signals
) -> None:
    assert isinstance(redis_client, EmbeddedRedis)
    data = write_jsonl(tmp_path / "many.jsonl", labelled_texts(40_000, seed=1))
    name = f"stopped-{os.getpid()}-{stop}"
    place = ["--redis-url", redis_client.url, "--data-dir", tmp_path, "--name", name]
    fitting = start("fit", "--model", tiny, "--data", data, "--layer", "all", "--threads", "1", *place)
    fitting.says(fitting.stderr, "fitting")
    fitting.process.send_signal(stop)
    assert fitting.end() == 130
    assert "resumes" in fitting.stderr[-1]
    assert "Traceback" not in "".join(fitting.stderr)
    assert fitting.stdout == []
    assert not RangeStore(redis_client, name).list()


LOST = """
import sys
from app.cli.listening import bind
from app.cli.serve import serve_until_told
from app.settings import Settings
from app.wiring import open_service
settings = Settings(model=sys.argv[1], data_dir=sys.argv[2], port=0, threads=1, device="cpu")
from app import cli
def serve():
    with bind(settings) as bound, open_service(settings) as service:
        def lost(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        service.engine.model.steered._call = lost
        serve_until_told([service], settings, bound)
cli.app.command("lost")(serve)
sys.exit(cli.run(["lost"]))
"""


def test_a_server_whose_device_is_lost_says_so_and_exits(tiny: Path, tmp_path: Path) -> None:
    """A supervisor can start it again; what waited is answered with an error, not left hanging."""
    served = Running((tiny, tmp_path), program=[sys.executable, "-c", LOST])
    try:
        address = served.says(served.stdout, "serving tiny-news at ").split()[-1]
        answer = httpx.post(f"{address}/v1/classify", json={"inputs": ["one", "two"]}, trust_env=False, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")
        assert served.end() == 1
        (line,) = [line for line in served.stderr if line.startswith("error:")]
        assert "illegal memory access" in line
    finally:
        served.kill()
