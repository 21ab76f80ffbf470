"""docs/metrics.md has one row for each metric that a running service exposes, and no others."""

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from tests.servers import RunningServer
from workers.cluster.metrics import FleetMetrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SUFFIX = {"counter": "_total", "info": "_info"}
OF_A_FLEET = "`neuronlens_fleet_"


def lines() -> list[str]:
    return PAGE.read_text("utf-8").splitlines()


def row(family: Metric, *more: str) -> str:
    """A metric as a row of the table on the page."""
    assert family.samples, f"{family.name} has no sample: have the test make one"
    labels = [*more, *(name for name in family.samples[0].labels if name != "le")]
    kind = "gauge, always 1" if family.type == "info" else family.type
    name = family.name + SUFFIX.get(family.type, "")
    return f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {family.documentation} |"


def test_the_page_lists_exactly_the_metrics_of_a_server(server: RunningServer) -> None:
    server.http.put("/v1/erasures/Sports", json={})
    server.classify(["one text", "another"], compare=True).raise_for_status()
    rows = [row(family) for family in server.registry.collect()]
    names = ("| `neuronlens_", "| `process_", "| `python_")
    written = [line for line in lines() if line.startswith(names) and OF_A_FLEET not in line]
    missing, outdated = sorted(set(rows) - set(written)), sorted(set(written) - set(rows))
    assert (missing, outdated) == ([], []), "\n".join(["add:", *missing, "remove:", *outdated])
    assert len(written) == len(rows), "a metric has two rows"


def test_the_page_lists_exactly_the_metrics_of_a_fleet() -> None:
    registry = CollectorRegistry()
    FleetMetrics(registry, lambda: 1, lambda: 1)
    found = [row(family, "model") for family in registry.collect() if family.name.startswith("neuronlens_fleet")]
    assert found == [line for line in lines() if OF_A_FLEET in line], "\n".join(found)
