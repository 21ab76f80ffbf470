"""Writes the results of an evaluation: results.json, results.csv, statistics.json, run.json and report.html."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from range_store.atomic_files import atomic_write
from range_store.domain.inspection import salient_overlap
from range_store.domain.range_set import InspectLayer, RangeSet
from workers.evaluation.activations import OVERLAP_FRACTION
from workers.evaluation.claims import claims
from workers.evaluation.evaluate import Evaluation
from workers.evaluation.measures import CSV_COLUMNS
from workers.evaluation.report import write_report
from workers.evaluation.statistics import range_overlap, shapes


def write(out: Path, evaluation: Evaluation, range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> None:
    """Write the files into the directory `out`, each atomically.

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
    _replace(out / "statistics.json", _json(_statistics(evaluation, range_set, inspect)))
    write_report(out / "report.html", evaluation.rows, evaluation.run, evaluation.selected, range_set, inspect)


def _statistics(evaluation: Evaluation, range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> dict[str, object]:
    """The claims, and by layer the shapes of activations and the overlaps of concepts."""
    rankings = range_set.provenance.settings.rankings
    layers = {}
    for layer in sorted(inspect):
        overlaps = {ranking: salient_overlap(range_set, layer, ranking, OVERLAP_FRACTION) for ranking in rankings}
        layers[str(layer)] = {
            "shapes": [_finite(asdict(shape)) for shape in shapes(range_set, layer, inspect[layer])],
            "overlap_of_ranges": [_finite(asdict(range_overlap(range_set, layer, ranking))) for ranking in rankings],
            "overlap_of_tops": {
                ranking: {
                    "top_fraction": OVERLAP_FRACTION,
                    "chance": found.chance,
                    "concepts": list(range_set.concepts),
                    "share": found.share.tolist(),
                    "jaccard": found.jaccard.tolist(),
                    "shared_by_all": list(found.shared_by_all),
                }
                for ranking, found in overlaps.items()
            },
        }
    return {"claims": [asdict(claim) for claim in claims(evaluation.rows, range_set, inspect)], "layers": layers}


def _finite(values: dict[str, object]) -> dict[str, object]:
    """The values with null instead of NaN, which JSON does not have."""
    return {key: None if value != value else value for key, value in values.items()}


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")
