"""docs/metrics.md has one row for each metric that a running service exposes, and no other."""

from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric

from tests.e2e.conftest import Running, fitted, model, news, serve  # noqa: F401 (fixtures)

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SUFFIX = {"counter": "_total", "info": "_info"}


def row(family: Metric) -> str:
    """A metric as a row of the page's table."""
    assert family.samples, f"{family.name} has no sample: have the test make one"
    labels = [name for name in family.samples[0].labels if name != "le"]
    kind = "gauge, always 1" if family.type == "info" else family.type
    name = family.name + SUFFIX.get(family.type, "")
    return f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {family.documentation} |"


@pytest.mark.usefixtures("fitted", "model")
def test_every_metric_is_documented_and_every_documented_one_exists(news: Running) -> None:  # noqa: F811
    news.http.put("/v1/erasures/Sports", json={})
    news.classify(["one text", "another"], compare=True).raise_for_status()
    rows = [row(family) for family in news.registry.collect()]
    names = ("| `neuronlens_", "| `process_", "| `python_")
    written = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(names)]
    missing, outdated = sorted(set(rows) - set(written)), sorted(set(written) - set(rows))
    assert (missing, outdated) == ([], []), "\n".join(["add:", *missing, "take out:", *outdated])
    assert len(written) == len(rows), "a metric has two rows"
