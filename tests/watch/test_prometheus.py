"""A real Prometheus with the committed configuration scrapes a live server and evaluates rules and queries.

`test_faults.py` and `test_fleet.py` (make test-full) break the service and expect every alert and data in every panel.
"""

import time
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.range_store.waiting import until
from tests.servers import RunningServer
from tests.watch.expressions import queries, variables
from tests.watch.prometheus import Prometheus, promtool

pytestmark = pytest.mark.system


def test_promtool_accepts_names_and_types_of_metrics(server: RunningServer) -> None:
    server.classify("a goal", erase=["Sports"])
    checked = promtool("check", "metrics", stdin=server.http.get("/metrics").text)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_server_is_scraped_and_alerts_fire(server: RunningServer, tmp_path: Path) -> None:
    """A live target and one that is down; then no target at all."""
    began = time.time()
    live = server.url.removeprefix("http://")
    prometheus = Prometheus(tmp_path, [live, f"127.0.0.1:{free_port()}"], ingress=live)
    try:
        server.http.put("/v1/erasures/Sports", json={"top_fraction": 1.0}).raise_for_status()
        assert server.classify("The striker scored twice.").status_code == 200
        until(lambda: "NeuronLensDown" in prometheus.firing())
        until(lambda: prometheus.over(f'neuronlens_texts_total{{instance="{live}"}}', began, time.time()))
        for where, selector, label in variables():
            assert prometheus.label_values(selector, label, began, time.time()), f"{where}: {selector}"
        for query in queries():
            prometheus.over(query.expr, began, time.time())  # fails if Prometheus rejects the query
        prometheus.watch([])
        until(lambda: {"NeuronLensAbsent", "NeuronLensNoReplicaReady"} <= prometheus.firing())
    finally:
        prometheus.stop()
