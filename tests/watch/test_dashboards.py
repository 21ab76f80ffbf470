"""The committed dashboards: the generator's output, valid in Grafana's model, and documented.

Grafana itself is not run. Its SDK reads the JSON into the model of Grafana 11.6 and writes it again: a field that the
model does not know is lost.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.watch.prometheus import DASHBOARDS, ROOT

GRAFANA = ROOT / "docker" / "grafana"
ANNOTATIONS_OF_THE_PROMETHEUS_PLUGIN = {"step", "titleFormat", "textFormat", "tagKeys", "useValueForTime"}

each = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def test_committed_json_is_the_output_of_the_generator(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "generate.py", tmp_path], check=True, timeout=60)
    assert {path.name for path in DASHBOARDS} == {path.name for path in tmp_path.glob("*.json")}
    for path in DASHBOARDS:
        assert path.read_text("utf-8") == (tmp_path / path.name).read_text("utf-8"), path.name


@each
def test_grafana_model_keeps_every_field(path: Path) -> None:
    register_default_plugins()
    written = json.loads(path.read_text("utf-8"))
    for mark in written["annotations"]["list"]:  # fields of the plugin, which the model of a dashboard leaves out
        assert mark.keys() >= ANNOTATIONS_OF_THE_PROMETHEUS_PLUGIN
        for field in ANNOTATIONS_OF_THE_PROMETHEUS_PLUGIN:
            del mark[field]
    again = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    assert list(lost(written, again, "")) == []


def lost(written: Any, again: Any, at: str) -> Iterator[str]:
    """Places of values that are lost or changed; null and empty values may be lost."""
    if isinstance(written, dict) and isinstance(again, dict):
        for key, value in written.items():
            if key in again:
                yield from lost(value, again[key], f"{at}.{key}")
            elif value not in (None, [], {}):
                yield f"{at}.{key}"
    elif isinstance(written, list) and isinstance(again, list) and len(written) == len(again):
        for n, (one, other) in enumerate(zip(written, again, strict=True)):
            yield from lost(one, other, f"{at}[{n}]")
    elif written != again:
        yield f"{at}: {written!r} became {again!r}"


@each
def test_every_panel_has_description_unit_and_legend(path: Path) -> None:
    dashboard = json.loads(path.read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert [panel["id"] for panel in dashboard["panels"]] == list(range(1, len(dashboard["panels"]) + 1))
    for panel in panels:
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 20, title
        assert panel["datasource"]["uid"] == "${datasource}", title
        if panel["type"] in ("timeseries", "stat"):
            assert defaults["unit"], title
        if panel["type"] == "timeseries" and defaults["unit"] in ("none", "cps"):
            assert defaults["custom"]["axisLabel"], f"{title}: a number without an axis label"
        for target in panel["targets"]:
            assert "$job" in target["expr"] or "ALERTS" in target["expr"], title
            if panel["type"] == "timeseries" and target["legendFormat"] == "__auto":
                pytest.fail(f"{title}: a line without a legend")


@each
def test_panels_do_not_overlap(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(path.read_text("utf-8"))["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_provisioned_datasource_and_links_match_the_configuration() -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    scrape = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text("utf-8"))
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scrape["global"]["scrape_interval"]
    uids = {json.loads(path.read_text("utf-8"))["uid"] for path in DASHBOARDS}
    links = {link["url"] for path in DASHBOARDS for link in json.loads(path.read_text("utf-8"))["links"]}
    assert links == {f"/d/{uid}" for uid in uids}
