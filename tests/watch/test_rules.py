"""The committed rules: sound for promtool, and each alert is one that its unit tests would miss."""

import re
from pathlib import Path

import pytest
import yaml

from tests.watch.prometheus import CONFIG, ROOT, RULES, promtool, rules

ALERTS = rules("alert")


@pytest.mark.system
def test_promtool_accepts_configuration_and_rules() -> None:
    for checked in (promtool("check", "config", CONFIG / "prometheus.yml"), promtool("check", "rules", RULES)):
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.system
def test_unit_tests_of_the_rules_pass() -> None:
    tested = promtool("test", "rules", CONFIG / "rules_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.system
@pytest.mark.parametrize(("instead", "seen_as"), [("vector(0) > 1", "exp"), ("vector(1)", "got")])
def test_unit_tests_notice_every_alert_that_never_fires_or_always(tmp_path: Path, instead: str, seen_as: str) -> None:
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
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{alert.lower()}"


def test_the_runbook_has_a_section_for_every_alert_and_no_other() -> None:
    """Of the page that `runbook_url` leads to, as soon as it has a section for one."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    sections = set(re.findall(r"^### Alert: (\w+)$", page, re.MULTILINE))
    assert sections == ALERTS.keys()
