"""Writes the dashboards: `python docker/grafana/generate.py [DIRECTORY]`. A test holds the committed JSON against this.

Every metric that is named here must exist and have samples: `tests/watch` asks a real Prometheus each query.
"""

import json
import sys
from pathlib import Path

from operators import OPERATORS
from panels import BLUE, RED, Json, annotation, dashboard, link_to, variable
from queries import ME, OF
from steering import STEERING

VARIABLES = [
    variable("job", "Job", "label_values(neuronlens_ready, job)", all_of_them=False),
    variable("instance", "Replica", 'label_values(neuronlens_generation{job="$job"}, instance)', all_of_them=True),
    variable("model", "Model", f"label_values(neuronlens_generation{{{ME}}}, model)", all_of_them=True),
]
MARKS = [
    annotation(
        "Toggles",
        f"1000 * max by (change, model, concept) (neuronlens_live_changed_timestamp_seconds{{{OF}}})",
        BLUE,
        "{{change}} {{model}} {{concept}}",
        value_is_time=True,
    ),
    annotation(
        "Alerts",
        'max by (alertname) (ALERTS{alertstate="firing",alertname=~"NeuronLens.+"})',
        RED,
        "{{alertname}}",
    ),
]


def dashboards() -> dict[str, Json]:
    """Both dashboards, by file name."""
    return {
        "operators.json": dashboard(
            "neuronlens-operators",
            "NeuronLens: operators",
            "Readiness, traffic, latency, saturation and errors of the service.",
            OPERATORS,
            VARIABLES,
            MARKS,
            link_to("neuronlens-steering", "Steering"),
        ),
        "steering.json": dashboard(
            "neuronlens-steering",
            "NeuronLens: steering",
            "What is erased, since when, from where, and what that does to answers.",
            STEERING,
            VARIABLES,
            MARKS,
            link_to("neuronlens-operators", "Operators"),
        ),
    }


def main(directory: Path) -> None:
    for name, content in dashboards().items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dashboards")
