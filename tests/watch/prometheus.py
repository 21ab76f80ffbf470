"""Debian's Prometheus and promtool with the committed configuration, in which minutes become seconds."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.ports import free_port
from tests.range_store.waiting import until

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker" / "prometheus"
RULES = CONFIG / "rules.yml"
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))

WINDOWS = {"[5m]": "[5s]", "[10m]": "[10s]", "[30m]": "[8s]", "[1h]": "[8s]", "[6h]": "[15s]"}
"""Windows of the rules, and their replacements in tests."""
QUICK_THRESHOLDS = {
    "NeuronLensSnapshotOld": ("> 60", "> 2"),
    "NeuronLensRestarting": ("[30m]) > 2", "[5m]) > 0"),
}
"""Alerts whose threshold is a time or a number of restarts that a test does not wait for."""


def binary(name: str) -> str:
    """Path of a program of Debian's package `prometheus`; the test is skipped if it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def promtool(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [binary("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """The committed rules of a kind ("alert" or "record") by name."""
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return {rule[kind]: rule for group in groups for rule in group["rules"] if kind in rule}


def quick(rule: dict[str, Any]) -> dict[str, Any]:
    """A committed rule with windows and delays of seconds; nothing else of it changes."""
    expr = rule["expr"]
    if rule.get("alert") in QUICK_THRESHOLDS:
        slow, fast = QUICK_THRESHOLDS[rule["alert"]]
        assert slow in expr, f"{rule['alert']} has changed: change QUICK_THRESHOLDS too"
        expr = expr.replace(slow, fast)
    else:
        for window in re.findall(r"\[\w+\]", expr):
            expr = expr.replace(window, WINDOWS[window])
    return rule | {"expr": expr} | ({"for": "1s"} if "for" in rule else {})


class Prometheus:
    """A Prometheus process with the committed configuration except for its targets and intervals.

    Args:
        ingress: `host:port` of the server that lists the engines of its fleet.
    """

    def __init__(self, directory: Path, targets: Sequence[str], ingress: str | None = None) -> None:
        self._targets = directory / "targets.json"
        self.watch(targets)
        config = yaml.safe_load((CONFIG / "prometheus.yml").read_text("utf-8"))
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        assert job.pop("dns_sd_configs")
        (engines,) = job.pop("http_sd_configs")
        if ingress is not None:
            url = engines["url"].replace("service:8001", ingress)
            job["http_sd_configs"] = [{"url": url, "refresh_interval": "1s"}]
        job["file_sd_configs"] = [{"files": [str(self._targets)], "refresh_interval": "1s"}]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
        document = yaml.safe_load(RULES.read_text("utf-8"))
        for group in document["groups"]:
            group["rules"] = [quick(rule) for rule in group["rules"]]
        (directory / "rules.yml").write_text(yaml.safe_dump(document, width=1000), "utf-8")
        port = free_port()
        with (directory / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [
                    binary("prometheus"),
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        until(self._ready, 60)

    def _ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def watch(self, targets: Sequence[str]) -> None:
        """Replace the targets; Prometheus reads the new list by itself."""
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps([{"targets": list(targets)}] if targets else []), "utf-8")
        new.rename(self._targets)

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def firing(self) -> set[str]:
        """Names of the alerts that are firing."""
        return {each["labels"]["alertname"] for each in self._get("alerts")["alerts"] if each["state"] == "firing"}

    def over(self, expr: str, start: float, end: float) -> list[tuple[dict[str, str], list[float]]]:
        """Labels and values of every series of an expression, evaluated each second from `start` to `end`."""
        found = self._get("query_range", query=expr, start=start, end=end, step=1)["result"]
        return [(series["metric"], [float(value) for _, value in series["values"]]) for series in found]

    def label_values(self, selector: str, label: str, start: float, end: float) -> list[str]:
        found: list[str] = self._get(f"label/{label}/values", **{"match[]": selector, "start": start, "end": end})
        return found

    def stop(self) -> None:
        self._http.close()
        self.process.kill()
        self.process.wait()
