"""The committed rules: promtool accepts them, unit tests cover each alert, and they read metrics that exist."""

import re
from pathlib import Path

import pytest
import yaml

from app.http.routing import routes_of
from tests.app.openapi import application
from tests.servers import RunningServer
from tests.watch.expressions import queries, selectors
from tests.watch.prometheus import CONFIG, DASHBOARDS, ROOT, RULES, promtool, rules

ALERTS = rules("alert")


@pytest.mark.system
def test_promtool_accepts_configuration_and_rules() -> None:
    for checked in (promtool("check", "config", CONFIG / "prometheus.yml"), promtool("check", "rules", RULES)):
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.system
def test_unit_tests_of_the_rules_pass() -> None:
    tested = promtool("test", "rules", CONFIG / "rules_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_unit_test_in_which_it_fires() -> None:
    document = yaml.safe_load((CONFIG / "rules_test.yml").read_text("utf-8"))
    samples = [
        sample["labels"]
        for test in document["tests"]
        for expected in test["promql_expr_test"]
        for sample in expected.get("exp_samples", [])
    ]
    assert {name for labels in samples for name in re.findall(r'alertname="(\w+)"', labels)} == ALERTS.keys()


@pytest.mark.full
@pytest.mark.parametrize(("instead", "seen_as"), [("vector(0) > 1", "exp"), ("vector(1)", "got")])
def test_unit_tests_notice_an_alert_that_never_or_always_fires(tmp_path: Path, instead: str, seen_as: str) -> None:
    document = yaml.safe_load(RULES.read_text("utf-8"))
    for rule in (rule for group in document["groups"] for rule in group["rules"] if "alert" in rule):
        rule["expr"] = instead
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(document, width=1000), "utf-8")
    (tmp_path / "rules_test.yml").write_text((CONFIG / "rules_test.yml").read_text("utf-8"), "utf-8")
    tested = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert tested.returncode == 1
    blamed = [line for line in (tested.stdout + tested.stderr).splitlines() if line.strip().startswith(seen_as)]
    missed = [alert for alert in ALERTS if not any(f'"{alert}"' in line for line in blamed)]
    assert missed == [], "\n".join(blamed)


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_severity_description_and_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{alert.lower()}"


def test_runbook_has_a_section_for_every_alert_and_no_other() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    sections = set(re.findall(r"^### Alert: (\w+)$", page, re.MULTILINE))
    assert sections == ALERTS.keys()


def test_rules_and_dashboards_read_only_metrics_that_exist(server: RunningServer) -> None:
    """Metrics of a fleet exist only on one; `test_fleet.py` reads them there."""
    exposed = set(re.findall(r"^# TYPE (\S+)", server.http.get("/metrics").text, re.MULTILINE))
    known = exposed | rules("record").keys() | {"up", "ALERTS"}
    read = {name.partition("{")[0] for query in queries() for name in selectors(query.expr)}
    missing = {name for name in read if not {name, re.sub("_(bucket|count|sum|total)$", "", name)} & known}
    assert {name for name in missing if not name.startswith("neuronlens_fleet")} == set()


def post_routes() -> dict[str, bool]:
    """Template of every POST route, and whether its function classifies."""
    found = {}
    for route in routes_of(application()):
        if "POST" in (route.methods or ()):
            found[route.path_format] = "answer_to" in route.endpoint.__code__.co_names
    return found


def test_rules_and_dashboards_select_exactly_the_classifying_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    classifying = {template for template, classifies in post_routes().items() if classifies}
    assert classifying == {route.path_format for route in routes_of(application()) if route.info.classifies}
    monkeypatch.syspath_prepend(ROOT / "docker" / "grafana")
    selector = __import__("queries").CLASSIFYING
    method, routes = re.fullmatch(r'method="(\w+)",route=~"([^"]+)"', selector).groups()
    assert method == "POST"
    assert {template for template in post_routes() if re.fullmatch(routes, template)} == classifying

    expressions = [rule["expr"] for rule in rules("record").values()]
    for path in DASHBOARDS:
        expressions += re.findall(r'"expr": "(.+)"', path.read_text("utf-8").replace('\\"', '"'))
    chosen = re.compile(r"neuronlens_http_request_seconds\w*\{([^}]*)\}")
    of_rules = re.compile(r"neuronlens_http_requests_total\{([^}]*)\}")
    found = [inside for expr in expressions for inside in chosen.findall(expr)]
    found += [inside for rule in rules("record").values() for inside in of_rules.findall(rule["expr"])]
    assert len(found) > 10
    assert [inside for inside in found if selector not in inside] == []
    assert selector in (ROOT / "docs" / "metrics.md").read_text("utf-8")
