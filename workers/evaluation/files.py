"""The directory that an evaluation leaves: results.json, results.csv, run.json and report.html."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

from range_store.range_set import InspectLayer, RangeSet
from workers.evaluation.evaluate import Evaluation
from workers.evaluation.measures import CSV_COLUMNS
from workers.evaluation.report import write_report


def write(out: Path, evaluation: Evaluation, range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> None:
    """Write every file into the directory `out`, each whole or not at all.

    Args:
        inspect: moments and histograms of the layers that the report shows.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [row.as_json() for row in evaluation.rows]
    _replace(out / "results.json", _json(rows))
    table = io.StringIO()
    writer = csv.DictWriter(table, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(out / "results.csv", table.getvalue())
    _replace(out / "run.json", _json(evaluation.run))
    write_report(out / "report.html", evaluation.rows, evaluation.run, evaluation.choices, range_set, inspect)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
