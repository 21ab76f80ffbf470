"""Directories of reports in the form that `neuronlens evaluate` writes."""

import json
from pathlib import Path
from typing import Any

RUN: dict[str, Any] = {
    "model": {"id": "tiny-news"},
    "test": {"name": "test.jsonl", "rows": 7},
    "settings": {"targets": ["World", "Sci/Tech"], "methods": ["neuron", "range"]},
}
PAGE = "<!doctype html><title>A report</title><script>document.title = 'drawn'</script>"


def write_report(reports: Path, name: str, **run: Any) -> Path:
    """Write a complete report below `reports`; `run` overrides fields of its run.json. Return its directory."""
    directory = reports / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.html").write_text(PAGE, "utf-8")
    (directory / "results.csv").write_text("target,acc\nWorld,0.5\n", "utf-8")
    (directory / "run.json").write_text(json.dumps(RUN | run), "utf-8")
    return directory
