"""The paper's figures, drawn with plotly from an evaluation's rows and a range set's histograms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from range_store.domain.range_set import InspectLayer, RangeSet
from range_store.domain.ranges import range_bounds
from workers.evaluation.measures import Row
from workers.evaluation.statistics import ShownNeuron

COLOURS = ("#3366aa", "#cc5533", "#339966", "#9955aa", "#bb9922", "#557788", "#aa3366", "#66aa33")
MARKERS = ("circle", "square", "diamond", "cross")
"""Tell lines of one colour apart, of which there may be more than colours."""
_LAYOUT = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
}


Destinations = tuple[str, Mapping[str, float]]
"""A target and how it was masked, and which share of its texts gets each label; "" is none."""
NO_LABEL = "no label"


@dataclass(frozen=True)
class Line:
    """Mean rows along one axis: x values, and the row at each."""

    name: str
    points: Sequence[tuple[float | str, Row]]


def deltas(lines: Sequence[Line], axis: str, *, from_zero: bool = False) -> go.Figure:
    """Accuracy above, confidence below, the targets left of the others, with bootstrap bands (Figure 6; Tables 9-10).

    Args:
        from_zero: begin every line at (0, 0): nothing is masked there, so nothing changes.
    """
    panels = ("targets: ΔAcc", "all others: ΔCAcc", "targets: ΔConf", "all others: ΔCConf")
    figure = make_subplots(2, 2, shared_yaxes=True, subplot_titles=panels, vertical_spacing=0.16)
    names = ("delta_acc", "delta_cacc", "delta_conf", "delta_cconf")
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        dash = "dash" if line.name.startswith("neuron") else "solid"
        for panel, name in enumerate(names):
            at = (panel // 2 + 1, panel % 2 + 1)
            x: list[float | str] = [place for place, _ in line.points]
            y = [getattr(row, name) for _, row in line.points]
            low = [getattr(row, f"{name}_low") for _, row in line.points]
            high = [getattr(row, f"{name}_high") for _, row in line.points]
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
            drawn = go.Scatter(
                x=x,
                y=y,
                name=line.name,
                legendgroup=line.name,
                showlegend=not panel,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": marker},
            )
            figure.add_trace(drawn, *at)
    figure.update_xaxes(title_text=axis)
    figure.update_yaxes(title_text="change of accuracy", row=1, col=1)
    figure.update_yaxes(title_text="change of confidence", row=2, col=1)
    figure.update_layout(**_LAYOUT, height=760, legend={"orientation": "h", "y": -0.12})
    return figure


def densities(
    range_set: RangeSet,
    inspect: InspectLayer,
    layer: int,
    neurons: Sequence[ShownNeuron],
    concepts: Sequence[str],
    tau: float,
) -> go.Figure:
    """Densities of some neurons' values per concept, with the bounds of each range (Figures 3-5)."""
    columns = min(2, len(neurons))
    lines = -(-len(neurons) // columns)
    titles = [f"neuron {each.neuron}: {each.why}" for each in neurons]
    figure = make_subplots(lines, columns, subplot_titles=titles, vertical_spacing=0.5 / max(lines, 2))
    serve = range_set.layer(layer)
    low, high = range_bounds("sigma", tau, range_set.counts[:, None], serve.mean, serve.std)
    lines_at_bounds: list[dict[str, object]] = []  # set at once: each call of add_vline copies all earlier lines
    for place, shown in enumerate(neurons):
        row, column = place // columns + 1, place % columns + 1
        axis = str(place + 1) if place else ""
        edges = inspect.edges[shown.neuron]
        for number, concept in enumerate(concepts):
            c = range_set.concept_index(concept)
            colour = COLOURS[number % len(COLOURS)]
            x, y = _density(edges, inspect.histogram[c, shown.neuron])
            trace = go.Scatter(
                x=x,
                y=y,
                name=concept,
                legendgroup=concept,
                showlegend=place == 0,
                line={"color": colour, "width": 1.5},
                fill="tozeroy",
                fillcolor=_faint(colour),
            )
            figure.add_trace(trace, row, column)
            for bound in (low[c, shown.neuron], high[c, shown.neuron]):
                if np.isfinite(bound):
                    line = {"color": colour, "width": 1, "dash": "dot"}
                    across = {"x0": bound, "x1": bound, "y0": 0, "y1": 1, "xref": f"x{axis}", "yref": f"y{axis} domain"}
                    lines_at_bounds.append({"type": "line", **across, "line": line})
    figure.update_xaxes(title_text="value of the neuron")
    figure.update_yaxes(title_text="density", col=1)
    figure.update_layout(
        **_LAYOUT, shapes=lines_at_bounds, height=90 + 230 * lines, legend={"orientation": "h", "y": -0.35 / lines}
    )
    return figure


def _density(edges: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints and densities of about 64 bins, where most of the values are; the histogram itself is finer."""
    inside = counts[1:-1].astype(np.float64)
    group = max(1, len(inside) // 64)
    usable = len(inside) // group * group
    merged = inside[:usable].reshape(-1, group).sum(axis=1)
    bounds_of = edges[: usable + 1 : group]
    middle = (bounds_of[1:] + bounds_of[:-1]) / 2
    total = max(float(counts.sum()), 1.0)
    return middle, merged / total / np.diff(bounds_of)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"


def destinations(rows: Sequence[Destinations], labels: Sequence[str]) -> go.Figure:
    """Which labels the targets' texts get when masked: one bar per target and masking.

    Args:
        labels: at most as many as there are `COLOURS`; "" stands for none.
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
