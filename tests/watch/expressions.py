"""Every query of every dashboard and rule, as Grafana and Prometheus send it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.watch.prometheus import DASHBOARDS, quick, rules

SUBSTITUTES = {"$__rate_interval": "4s", "$__interval": "1s", "$job": "neuronlens", "$instance": ".+", "$model": ".+"}
"""Values of Grafana's variables at a scrape interval of 1 s with "All" selected."""


@dataclass(frozen=True)
class Query:
    """One query and its place."""

    where: str
    """Dashboard and panel, or the name of the rule."""
    expr: str
    labels: frozenset[str] = frozenset()
    """Labels that a legend, a column or a title shows."""
    share: bool = False
    """The result is a share of 1."""

    def __str__(self) -> str:
        return self.where

    @property
    def reads_fleet(self) -> bool:
        """Whether it reads metrics of a fleet on Ray (see `test_fleet.py`)."""
        return "neuronlens_fleet" in self.expr


def substituted(expr: str) -> str:
    for name, value in SUBSTITUTES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"no substitute for a variable in: {expr}"
    return expr


def queries() -> list[Query]:
    """All queries of panels, annotations, recording rules and alerts."""
    found = [query for path in DASHBOARDS for query in _of_dashboard(json.loads(path.read_text("utf-8")))]
    found += [
        Query(f"record {name}", quick(rule)["expr"], share=":ratio" in name) for name, rule in rules("record").items()
    ]
    found += [Query(f"alert {name}", quick(rule)["expr"]) for name, rule in rules("alert").items()]
    return found


def _of_dashboard(dashboard: dict[str, Any]) -> Iterator[Query]:
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
            yield Query(where, substituted(target["expr"]), labels, share)
    for mark in dashboard["annotations"]["list"]:
        labels = frozenset(re.findall(r"{{(\w+)}}", mark["titleFormat"]))
        yield Query(f"{title} / annotation {mark['name']}", substituted(mark["expr"]), labels)


def variables() -> list[tuple[str, str, str]]:
    """Place, selector and label of every dashboard variable that lists the values of a label."""
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
    """The selectors of the series that an expression reads."""
    return sorted(set(_SELECTOR.findall(expr)))
