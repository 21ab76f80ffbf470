"""`neuronlens serve --ray ADDRESS` says so and ends when its machine's node or its cluster's head is lost."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import workers.cluster  # noqa: F401 (says how Ray is to be used)
from app.cli.exits import UNREACHABLE
from app.fleet import END_SECONDS, GRACE_SECONDS
from range_store.embedded import EmbeddedRedis
from range_store.store import RangeStore
from tests.range_store.waiting import until
from workers.fitting.fit import Fitted
from workers.models.loading import LoadedModel

from ray.cluster_utils import Cluster  # isort: skip

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]  # processes that load torch, on a busy machine

BUSY_SECONDS = 30.0
"""Added to every limit: the machine may have other work."""
HEAD_SECONDS = 6
"""An ingress is told to wait so long for its head; else it is 40."""
# on one machine Ray takes the head's node for a program's own; here each has its own, as on a machine of its own
ON_NODE = """
import functools, sys
import workers.cluster, ray
from app.cli import main
ray.init = functools.partial(ray.init, _node_ip_address=sys.argv.pop(1))
main()
"""


class Ingress:
    """A server beside the node of an address."""

    def __init__(self, node: str, *arguments: str) -> None:
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        env["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(20 + HEAD_SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_NODE, node, "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.process.stdout is not None
        said = re.match(r"serving news at (http://\S+)", self.process.stdout.readline())
        assert said is not None, self.process.communicate()[1]
        self.http = httpx.Client(base_url=said[1], timeout=30)

    def answers(self) -> bool:
        return self.http.post("/v1/classify", json={"inputs": "one"}).status_code == 200

    def ready(self) -> int:
        return self.http.get("/readyz").status_code

    def ends(self, seconds: float, why: str) -> None:
        assert self.process.wait(seconds + BUSY_SECONDS) == UNREACHABLE
        lines = self.process.communicate()[1].splitlines()
        assert re.fullmatch(f"error: the model cannot answer any more .{why}.; start the server again", lines[-1])
        assert any("the Ray cluster is lost" in line for line in lines)

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head that runs nothing; the test adds others, each as if on a machine of its own."""
    place = tempfile.mkdtemp(prefix="nlt-", dir="/tmp")  # paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", place)
        os.mkdir(f"{place}/ray")
        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
        made = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 100 << 20})
        try:
            yield made
        finally:
            made.shutdown()
            shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def ingress(
    nodes: Cluster, redis_client: redis.Redis, model: LoadedModel, fitted: Fitted, tmp_path: Path
) -> Iterator[Callable[[str], Ingress]]:
    """`ingress(node)`: starts a server, on a node that offers nothing, in front of one engine on another."""
    assert isinstance(redis_client, EmbeddedRedis)
    store = RangeStore(redis_client, "news")
    store.activate(store.publish(fitted.range_set, fitted.inspect))
    store.set_erasures([])
    nodes.add_node(num_cpus=1, node_ip_address="127.0.0.3", object_store_memory=100 << 20)
    started: list[Ingress] = []

    def start(node: str) -> Ingress:
        where = ["--ray", nodes.address, "--redis-url", redis_client.url, "--data-dir", str(tmp_path / node)]
        what = ["--model", model.source, "--name", "news", "--threads", "1", "--device", "cpu"]
        started.append(Ingress(node, *what, *where))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_an_ingress_whose_node_or_head_is_lost_answers_while_it_can_and_ends(
    nodes: Cluster, ingress: Callable[[str], Ingress]
) -> None:
    offers_nothing: dict[str, Any] = {"num_cpus": 0, "object_store_memory": 100 << 20}
    own = nodes.add_node(node_ip_address="127.0.0.4", **offers_nothing)
    nodes.add_node(node_ip_address="127.0.0.5", **offers_nothing)
    first, second = ingress("127.0.0.4"), ingress("127.0.0.5")
    assert first.answers()
    assert second.answers()
    until(lambda: first.ready() == second.ready() == 200)

    own.kill_raylet()
    until(lambda: first.ready() == 503)
    with ThreadPoolExecutor() as pool:  # at once: it answers for five seconds more, and a busy machine is slow
        asking = pool.submit(first.http.post, "/v1/classify", json={"inputs": ["word " * 4000] * 10})
        small = [pool.submit(first.answers) for _ in range(2)]
        large = asking.result()
        assert (large.status_code, large.json()["code"]) == (503, "replica_lost"), "which would go by the node"
        assert all(each.result() for each in small), "the engine is there"
    first.ends(GRACE_SECONDS + END_SECONDS, "the Ray node of this machine has ended")
    assert second.answers()
    assert second.ready() == 200, "which is nothing to those on other nodes"

    head = re.escape(nodes.address)
    lost = time.monotonic()
    nodes.head_node.kill_gcs_server()
    while time.monotonic() < lost + HEAD_SECONDS / 2:
        assert second.answers()
        assert second.ready() == 200
    until(lambda: second.ready() == 503, HEAD_SECONDS + BUSY_SECONDS)
    why = rf"the head of the Ray cluster, {head}, has not answered for \d+ s"
    second.ends(GRACE_SECONDS + END_SECONDS, why)
