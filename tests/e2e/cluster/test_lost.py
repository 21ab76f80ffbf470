"""`neuronlens serve --ray ADDRESS` ends with a message when the Ray node of its machine or the head is lost."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

import workers.cluster  # noqa: F401 (sets environment variables that Ray reads when it is imported)
from app.errors import UNREACHABLE
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.store import RangeStore
from tests.processes import Running
from tests.range_store.waiting import until
from workers.fitting.fit import FitResult
from workers.models.loading import LoadedModel

from ray.cluster_utils import Cluster  # isort: skip

pytestmark = pytest.mark.full

# On one machine Ray takes the node of the head for that of every program; here each program has its own, as it would on
# a machine of its own. The test decides when the head is given up (a file "head"), and when the time is over in which a
# server that lost its cluster still answers (a file "grace").
ON_NODE = """
import functools, os, time
import workers.cluster, ray
from app.serving import fleet
from workers.cluster import connection
ray.init = functools.partial(ray.init, _node_ip_address={node!r})
connection.head_seconds = lambda: 1.0 if os.path.exists({directory!r} + "/head") else 3600.0
class Clock:
    @staticmethod
    def sleep(seconds):
        while seconds == fleet.GRACE_SECONDS and not os.path.exists({directory!r} + "/grace"):
            time.sleep(0.05)
        if seconds != fleet.GRACE_SECONDS:
            time.sleep(300)
fleet.time = Clock
"""


class Ingress:
    """A server beside the node with this address."""

    def __init__(self, node: str, directory: Path, *arguments: str) -> None:
        directory.mkdir()
        self.directory = directory
        self.running = Running(
            ["serve", "--port", "0", "--data-dir", directory, *arguments],
            environment={"RAY_gcs_rpc_server_reconnect_timeout_s": "600"},
            code=ON_NODE.format(node=node, directory=str(directory)),
        )
        url = self.running.says(self.running.stdout, "serving news at ").split()[-1]
        self.http = httpx.Client(base_url=url, timeout=60)

    def answers(self) -> bool:
        return self.http.post("/v1/classify", json={"inputs": "one"}).status_code == 200

    def ready(self) -> int:
        return self.http.get("/readyz").status_code

    def ends(self, cause: str) -> None:
        """Let the time be over in which it still answers, and check how it ends."""
        (self.directory / "grace").touch()
        assert self.running.end() == UNREACHABLE
        lines = "".join(self.running.stderr).splitlines()
        assert re.fullmatch(f"error: the model failed .{cause}.: restart the server", lines[-1])
        assert any("the Ray cluster is lost" in line for line in lines)

    def close(self) -> None:
        self.http.close()
        self.running.kill()


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A cluster whose head offers no CPUs; the test adds nodes, each as if on a machine of its own."""
    directory = tempfile.mkdtemp(prefix="nlt-", dir="/tmp")  # paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", directory)
        os.mkdir(f"{directory}/ray")
        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.2"}
        started = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": 100 << 20})
        try:
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def ingress(
    nodes: Cluster, redis_client: redis.Redis, model: LoadedModel, fitted: FitResult, tmp_path: Path
) -> Iterator[Callable[[str], Ingress]]:
    """`ingress(node)`: starts a server on a node without CPUs, in front of one engine on another node."""
    assert isinstance(redis_client, EmbeddedRedis)
    url = redis_client.url
    store = RangeStore(redis_client, "news")
    store.activate(store.range_sets.publish(fitted.range_set, fitted.inspect))
    store.set_erasures([])
    nodes.add_node(num_cpus=1, node_ip_address="127.0.0.3", object_store_memory=100 << 20)
    started: list[Ingress] = []

    def start(node: str) -> Ingress:
        cluster = ["--ray", nodes.address, "--redis-url", url]
        served = ["--model", model.source, "--name", "news", "--threads", "1", "--device", "cpu"]
        started.append(Ingress(node, tmp_path / node, *served, *cluster))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_ingress_that_lost_its_node_or_head_answers_while_it_can_and_ends(
    nodes: Cluster, ingress: Callable[[str], Ingress]
) -> None:
    no_cpus: dict[str, Any] = {"num_cpus": 0, "object_store_memory": 100 << 20}
    own = nodes.add_node(node_ip_address="127.0.0.4", **no_cpus)
    nodes.add_node(node_ip_address="127.0.0.5", **no_cpus)
    first, second = ingress("127.0.0.4"), ingress("127.0.0.5")
    assert first.answers()
    assert second.answers()
    until(lambda: first.ready() == second.ready() == 200)

    own.kill_raylet()
    until(lambda: first.ready() == 503)
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(first.http.post, "/v1/classify", json={"inputs": ["word " * 4000] * 10})
        small = [pool.submit(first.answers) for _ in range(2)]
        large = sent.result()
        assert (large.status_code, large.json()["code"]) == (503, "replica_lost"), "it would have to pass the lost node"
        assert all(each.result() for each in small), "small requests reach the engine"
    first.ends("the Ray node of this machine has ended")
    assert second.answers()
    assert second.ready() == 200, "servers on other nodes are not affected"

    head = re.escape(nodes.address)
    nodes.head_node.kill_gcs_server()
    second.running.says(second.running.stderr, "does not answer; engines continue")
    for _ in range(5):
        assert second.answers()
        assert second.ready() == 200
    (second.directory / "head").touch()
    until(lambda: second.ready() == 503)
    second.ends(rf"the head of the Ray cluster, {head}, has not answered for \d+ s")
