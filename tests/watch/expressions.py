"""Every query of every dashboard and rule, as Grafana and Prometheus would send it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.watch.prometheus import DASHBOARDS, quick, rules

SUBSTITUTES = {"$__rate_interval": "4s", "$__interval": "1s", "$job": "neuronlens", "$instance": ".+", "$model": ".+"}
"""What Grafana puts in at a scrape interval of 1 s, with "All" chosen: four scrapes; the variable's `allValue`."""


@dataclass(frozen=True)
class Asked:
    """One query, where it stands, and what is shown of its result.

    `labels`: those that a legend, a column or a title names. `share`: its unit is a share of 1.
    """

    where: str
    expr: str
    labels: frozenset[str] = frozenset()
    share: bool = False

    def __str__(self) -> str:
        return self.where

    @property
    def of_a_fleet(self) -> bool:
        """Whether it reads what only a fleet has: `test_fleet.py` has one."""
        return "neuronlens_fleet" in self.expr


def substituted(expr: str) -> str:
    for name, value in SUBSTITUTES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"nothing stands for a variable of: {expr}"
    return expr


def asked() -> list[Asked]:
    """All of them: panels, annotations, recording rules, alerts."""
    found = [query for path in DASHBOARDS for query in _of_dashboard(json.loads(path.read_text("utf-8")))]
    found += [
        Asked(f"record {name}", quick(rule)["expr"], share=":ratio" in name) for name, rule in rules("record").items()
    ]
    found += [Asked(f"alert {name}", quick(rule)["expr"]) for name, rule in rules("alert").items()]
    return found


def _of_dashboard(dashboard: dict[str, Any]) -> Iterator[Asked]:
    title = dashboard["title"]
    for panel in dashboard["panels"]:
        share = panel.get("fieldConfig", {}).get("defaults", {}).get("unit") == "percentunit"
        columns = {
            name
            for each in panel.get("transformations", [])
            for name in each["options"]["includeByName"]
            if name != "Value"
        }
        for target in panel.get("targets", []):
            labels = frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"])) | columns
            where = f"{title} / {panel['title']} / {target['refId']}"
            yield Asked(where, substituted(target["expr"]), labels, share)
    for mark in dashboard["annotations"]["list"]:
        labels = frozenset(re.findall(r"{{(\w+)}}", mark["titleFormat"]))
        yield Asked(f"{title} / annotation {mark['name']}", substituted(mark["expr"]), labels)


def variables() -> list[tuple[str, str, str]]:
    """Dashboard and name, selector, and label of every variable that asks for a label's values."""
    found = []
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text("utf-8"))
        for each in dashboard["templating"]["list"]:
            if each["type"] == "query":
                matched = re.fullmatch(r"label_values\((.+), (\w+)\)", each["query"]["query"])
                assert matched, each
                found.append((f"{dashboard['title']} / ${each['name']}", substituted(matched[1]), matched[2]))
    return found


_SELECTOR = re.compile(r"\b(?:neuronlens|process|python|up|ALERTS)[\w:]*(?:\{[^}]*\})?")


def selectors(expr: str) -> list[str]:
    """The series that an expression reads, each as a selector of its own."""
    return sorted(set(_SELECTOR.findall(expr)))
