"""Debian's Prometheus and promtool, and the committed configuration."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker" / "prometheus"
RULES = CONFIG / "rules.yml"
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))


def binary(name: str) -> str:
    """Where a program of Debian's package `prometheus` lies; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def promtool(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool; its exit code and what it said."""
    command = [binary("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


def rules(kind: str) -> dict[str, dict[str, Any]]:
    """The committed rules of a kind ("alert", "record"), by name."""
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return {rule[kind]: rule for group in groups for rule in group["rules"] if kind in rule}
