"""The paper's figures, drawn with plotly from the rows of an evaluation and the histograms of a range set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.domain.ranges import range_bounds
from workers.evaluation.measures import Row
from workers.evaluation.statistics import SelectedNeuron

COLOURS = ("#3366aa", "#cc5533", "#339966", "#9955aa", "#bb9922", "#557788", "#aa3366", "#66aa33")
MARKERS = ("circle", "square", "diamond", "cross")
"""Distinguish lines of the same colour, where there are more lines than colours."""
NO_LABEL = "no label"
_LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
}

Destinations = tuple[str, Mapping[str, float]]
"""A target and how it is masked, and the share of its texts that gets each label; "" is no label."""


@dataclass(frozen=True)
class Line:
    """Mean rows along one axis: x values, and the row at each."""

    name: str
    points: Sequence[tuple[float | str, Row]]


def deltas(lines: Sequence[Line], axis: str, *, from_zero: bool = False) -> go.Figure:
    """Changes of accuracy (above) and confidence (below) of targets (left) and all others (Figure 6; Tables 9-10).

    Args:
        from_zero: start every line at (0, 0), where nothing is masked.
    """
    panels = {
        "delta_acc": "targets: ΔAcc",
        "delta_cacc": "all others: ΔCAcc",
        "delta_conf": "targets: ΔConf",
        "delta_cconf": "all others: ΔCConf",
    }
    figure = make_subplots(2, 2, shared_yaxes=True, subplot_titles=tuple(panels.values()), vertical_spacing=0.16)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        dash = "dash" if line.name.startswith("neuron") else "solid"
        for panel, name in enumerate(panels):
            at = (panel // 2 + 1, panel % 2 + 1)
            x: list[float | str] = [position for position, _ in line.points]
            y, low, high = ([getattr(row, name + end) for _, row in line.points] for end in ("", "_low", "_high"))
            if from_zero:
                x, y, low, high = [0.0, *x], [0.0, *y], [0.0, *low], [0.0, *high]
            if len(x) > 1 and not np.isnan(low).any():
                band = go.Scatter(
                    x=[*x, *reversed(x)],
                    y=[*high, *reversed(low)],
                    mode="lines",
                    fill="toself",
                    fillcolor=colour,
                    opacity=0.15,
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                )
                figure.add_trace(band, *at)
            trace = go.Scatter(
                x=x,
                y=y,
                name=line.name,
                legendgroup=line.name,
                showlegend=not panel,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": marker},
            )
            figure.add_trace(trace, *at)
    figure.update_xaxes(title_text=axis)
    figure.update_yaxes(title_text="change of accuracy", row=1, col=1)
    figure.update_yaxes(title_text="change of confidence", row=2, col=1)
    figure.update_layout(**_LAYOUT, height=760, legend={"orientation": "h", "y": -0.12})
    return figure


def densities(
    range_set: RangeSet,
    inspect: InspectLayer,
    layer: int,
    neurons: Sequence[SelectedNeuron],
    concepts: Sequence[str],
    tau: float,
) -> go.Figure:
    """Densities of some neurons' values per concept, with the bounds of each range (Figures 3-5)."""
    columns = min(2, len(neurons))
    lines = -(-len(neurons) // columns)
    titles = [f"neuron {each.neuron}: {each.reason}" for each in neurons]
    figure = make_subplots(lines, columns, subplot_titles=titles, vertical_spacing=0.5 / max(lines, 2))
    serve = range_set.layer(layer)
    low, high = range_bounds("sigma", tau, range_set.counts[:, None], serve.mean, serve.std)
    bound_lines: list[dict[str, object]] = []  # added together: each call of add_vline copies all earlier lines
    for index, selected in enumerate(neurons):
        row, column = index // columns + 1, index % columns + 1
        axis = str(index + 1) if index else ""
        edges = inspect.edges[selected.neuron]
        for number, concept in enumerate(concepts):
            c = range_set.concept_index(concept)
            colour = COLOURS[number % len(COLOURS)]
            x, y = _density(edges, inspect.histogram[c, selected.neuron])
            trace = go.Scatter(
                x=x,
                y=y,
                name=concept,
                legendgroup=concept,
                showlegend=index == 0,
                line={"color": colour, "width": 1.5},
                fill="tozeroy",
                fillcolor=_transparent(colour),
            )
            figure.add_trace(trace, row, column)
            for bound in (low[c, selected.neuron], high[c, selected.neuron]):
                if np.isfinite(bound):
                    line = {"color": colour, "width": 1, "dash": "dot"}
                    ends = {"x0": bound, "x1": bound, "y0": 0, "y1": 1, "xref": f"x{axis}", "yref": f"y{axis} domain"}
                    bound_lines.append({"type": "line", **ends, "line": line})
    figure.update_xaxes(title_text="value of the neuron")
    figure.update_yaxes(title_text="density", col=1)
    figure.update_layout(
        **_LAYOUT, shapes=bound_lines, height=90 + 230 * lines, legend={"orientation": "h", "y": -0.35 / lines}
    )
    return figure


def destinations(rows: Sequence[Destinations], labels: Sequence[str]) -> go.Figure:
    """Which labels the targets' texts get when masked: one bar per target and masking.

    Args:
        labels: at most as many as there are `COLOURS`; "" is no label.
    """
    names = [name for name, _ in rows]
    figure = go.Figure()
    for number, label in enumerate(labels):
        colour = COLOURS[number % len(COLOURS)] if label else "#888888"
        shares = [of_row.get(label, 0.0) for _, of_row in rows]
        figure.add_bar(y=names, x=shares, name=label or NO_LABEL, orientation="h", marker_color=colour)
    figure.update_yaxes(autorange="reversed", type="category", title_text="target, masking")
    figure.update_layout(
        **{**_LAYOUT, "margin": {"l": 220, "r": 20, "t": 30, "b": 50}},
        barmode="stack",
        height=120 + 30 * len(names),
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_xaxes(title_text="share of the target's texts", range=[0, 1])
    return figure


def _density(edges: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints and densities of the histogram's bins, merged into about 64."""
    inside = counts[1:-1].astype(np.float64)
    group = max(1, len(inside) // 64)
    usable = len(inside) // group * group
    merged = inside[:usable].reshape(-1, group).sum(axis=1)
    merged_edges = edges[: usable + 1 : group]
    total = max(float(counts.sum()), 1.0)
    return (merged_edges[1:] + merged_edges[:-1]) / 2, merged / total / np.diff(merged_edges)


def _transparent(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"
