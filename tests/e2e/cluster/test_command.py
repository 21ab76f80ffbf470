"""`neuronlens serve --ray` starts a private cluster, which ends with the command."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.app.cli.conftest import Cli, cli  # noqa: F401 (a fixture)
from tests.range_store.waiting import until
from workers.models.loading import LoadedModel

SECRET = "confession"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # pragma: allowlist secret


@pytest.mark.full
def test_server_on_a_private_cluster_loads_no_torch_and_leaves_no_process(model: LoadedModel, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli", "serve", "--model", model.source, "--ray", "--threads", "1"]
    where = ["--port", "0", "--data-dir", str(tmp_path), "--log-level", "debug"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    server = subprocess.Popen(
        [*command, *where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env
    )
    try:
        assert server.stdout is not None
        said = re.match(r"serving tiny-news at (http://\S+)", server.stdout.readline())
        assert said is not None, server.stderr and server.stderr.read()
        headers = {"X-Request-ID": "mine-1", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        asked = {"inputs": ["one", SECRET]}
        answer = httpx.post(f"{said[1]}/v1/classify", json=asked, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["results"]) == 2
        assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
        of_ray = psutil.Process(server.pid).children(recursive=True)
        assert of_ray
        (place,) = set(re.findall(r"/tmp/neuronlens-\w{8}", " ".join(map(_command_line, of_ray))))
        until(lambda: "mine-1" in _log_of_workers(place))
        (there,) = _lines_of_request(_log_of_workers(place).splitlines())
        known = {"request_id": "mine-1", "trace_id": TRACE, "span_id": PARENT, "model": "tiny-news"}
        assert there.items() >= {**known, "logger": "app.serving.logged_replica", "level": "debug", "texts": 2}.items()
        assert SECRET not in _log_of_workers(place)
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        assert server.wait(120) == 0, server.stderr and server.stderr.read()
        until(lambda: not any(map(_command_line, of_ray)))
        assert server.stderr is not None
        (here,) = _lines_of_request(server.stderr.read().splitlines())
        shared = ("replica", "generation", *known)
        assert {name: here[name] for name in shared} == {name: there[name] for name in shared}
        assert here["generation"] == answer.json()["erasure"]["generation"]
    finally:
        server.kill()
        server.communicate()


def _command_line(process: psutil.Process) -> str:
    """The command line of a process; "" when it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()) if process.is_running() else ""
    return ""


def _log_of_workers(place: str) -> str:
    """What the worker processes of a private cluster wrote to stderr."""
    return "".join(each.read_text() for each in Path(place, "session_latest", "logs").glob("worker-*.err"))


def _lines_of_request(lines: list[str]) -> list[dict[str, Any]]:
    """The records of the request that this test makes."""
    return [json.loads(line) for line in lines if '"mine-1"' in line]


def test_commands_that_need_a_cluster_say_so(cli: Cli, model: LoadedModel) -> None:  # noqa: F811
    alone = cli("serve", "--model", model.source, "--replicas", "2")
    assert (alone.exit_code, "--ray" in alone.stderr) == (2, True)
    on_ray = ("serve", "--model", model.source, "--port", "0", "--ray", "127.0.0.1:1")
    nowhere = cli(*on_ray, "--redis-url", "redis://127.0.0.1:1")
    assert (nowhere.exit_code, "no Ray cluster" in nowhere.stderr) == (3, True)
    assert cli(*on_ray).exit_code == 2  # no store that all nodes reach
    assert cli("fleet", "list").exit_code == 2
