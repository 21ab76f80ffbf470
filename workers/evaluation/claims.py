"""The paper's claims, each decided by a fixed rule for this model and these texts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import ndtri

from range_store.domain.range_set import InspectLayer, RangeSet
from workers.evaluation.measures import MEAN, Row
from workers.evaluation.statistics import range_overlap

Verdict = Literal["yes", "no", "not measured"]
LEVEL = 0.05
"""Probability of a yes to less interference if no setting has a gain."""
COLLAPSE_FRACTION = 0.5
"""Share of the neurons beyond which neuron masking is claimed to collapse."""
COLLAPSE = -0.25
"""Change of the others' accuracy that counts as a collapse."""
TOLERANCE = -0.05
"""Change of the others' accuracy that does not count as a loss."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, the verdict, and the figures behind it."""

    statement: str
    verdict: Verdict
    evidence: str


def claims(rows: Sequence[Row], range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> list[Claim]:
    """All four claims in the paper's order; "not measured" where the rows lack what a claim needs."""
    means = [row for row in rows if row.target == MEAN and row.delta_cacc == row.delta_cacc]
    return [interference(means), collapse(means), separable(means, range_set), last_layer(means)]


def interference(means: Sequence[Row]) -> Claim:
    """Yes if the largest gain in CAcc of range over neuron masking, over equal settings, is significantly above 0.

    The level is divided by the number of gains, since the largest is tested (Bonferroni). The standard error of a gain
    is computed from both intervals as if the measurements were independent. They are of the same texts, so this
    overestimates it.
    """
    statement = "Range masking interferes less with other concepts than neuron masking (the paper: by up to 25 points)."
    pairs = [
        (ranged.delta_cacc - neuron.delta_cacc, ranged, neuron)
        for ranged in means
        if ranged.method == "range"
        for neuron in means
        if neuron.method == "neuron" and _comparable(ranged, neuron) and neuron.top_fraction == ranged.top_fraction
    ]
    if not pairs:
        return Claim(statement, "not measured", "Needs both methods with the same setting.")
    gain, ranged, neuron = max(pairs, key=lambda pair: pair[0])
    error = math.hypot(_standard_error(ranged), _standard_error(neuron))
    bound = gain - float(ndtri(1 - LEVEL / len(pairs))) * error
    has_intervals = not math.isnan(bound)
    corrected = f", corrected for {len(pairs)} settings" if len(pairs) > 1 else ""
    at_least = f", at least {100 * bound:+.1f} with 95 % confidence{corrected}" if has_intervals else ""
    setting = f"layer {ranged.layer}, {ranged.ranking}, τ {ranged.tau:g}, top {ranged.top_fraction:g}"
    return Claim(
        statement,
        "yes" if (bound if has_intervals else gain) > 0 else "no",
        f"At most {100 * gain:+.1f} points of the others' accuracy{at_least}: {_with_interval(ranged)} with ranges, "
        f"{_with_interval(neuron)} with neurons ({setting}).",
    )


def collapse(means: Sequence[Row]) -> Claim:
    """Yes if both hold at the last layer.

    Neuron masking costs the others 25 points or more at most of the measured fractions beyond one half. Range masking,
    at its smallest measured τ of 2 or more, never costs them more than 5, up to all neurons.
    """
    statement = "Neuron masking collapses past 50 % of the neurons, while range masking holds to 100 %."
    beyond = [row for row in means if row.top_fraction > COLLAPSE_FRACTION]
    ranged = [row for row in beyond if row.method == "range" and (row.tau or 0) >= 2]
    neuron = [row for row in beyond if row.method == "neuron"]
    if not neuron or not any(row.top_fraction == 1.0 for row in ranged):
        return Claim(statement, "not measured", "Needs both methods beyond half of the neurons, up to all of them.")
    layer = max(neuron + ranged, key=lambda row: _layer_order(row.layer)).layer
    tau = min(row.tau or 0 for row in ranged)
    first = next(row for row in neuron + ranged if row.layer == layer)
    neuron = [row for row in neuron if row.layer == layer and _comparable(row, first)]
    ranged = [row for row in ranged if row.layer == layer and _comparable(row, first) and row.tau == tau]
    if not neuron or not ranged:
        return Claim(statement, "not measured", "Needs both methods with the same setting.")
    collapsed = [row.top_fraction for row in neuron if row.delta_cacc <= COLLAPSE]
    worst = min(ranged, key=lambda row: row.delta_cacc)
    holds = 2 * len(collapsed) > len(neuron) and worst.delta_cacc >= TOLERANCE
    since = f", from top {min(collapsed):g} on" if collapsed else ""
    at_all = max(neuron, key=lambda row: row.top_fraction)
    return Claim(
        statement,
        "yes" if holds else "no",
        f"Layer {layer}, {first.ranking}: neuron masking costs the others 25 points or more at {len(collapsed)} of "
        f"{len(neuron)} measured fractions beyond one half{since} ({_with_interval(at_all)} at top "
        f"{at_all.top_fraction:g}); range masking (τ {tau:g}) {_with_interval(worst)} at worst, at top "
        f"{worst.top_fraction:g}.",
    )


def separable(means: Sequence[Row], range_set: RangeSet) -> Claim:
    """Yes if ranges of two concepts overlap less at the top 5 % of the neurons than at the bottom 5 %.

    Compared are mean overlap coefficients at the last fitted layer, and every fitted ranking must agree.
    """
    statement = "Ranges of different concepts overlap less for top than for bottom neurons."
    if len(range_set.concepts) < 2:
        return Claim(statement, "not measured", "Needs two concepts.")
    layer = max(range_set.layers)
    overlaps = [range_overlap(range_set, layer, ranking) for ranking in range_set.provenance.settings.rankings]
    listed = "; ".join(f"{each.ranking} {each.top:.3f} against {each.bottom:.3f}" for each in overlaps)
    return Claim(
        statement,
        "yes" if all(each.top < each.bottom for each in overlaps) else "no",
        f"Layer {layer}, τ 2.5, {overlaps[0].neurons} neurons each, mean overlap coefficient at the top against the "
        f"bottom: {listed}.",
    )


def last_layer(means: Sequence[Row]) -> Claim:
    """Yes if, for range masking at the largest measured fraction, ΔCAcc − ΔAcc is largest at the last layer."""
    statement = "The last layer is the best place to mask."
    single = [row for row in means if isinstance(row.layer, int) and row.method == "range"]
    if len({row.layer for row in single}) < 2:
        return Claim(statement, "not measured", "Needs several layers.")
    fraction = max(row.top_fraction for row in single)
    tau = min((row.tau or 0 for row in single), key=lambda tau: abs(tau - 2.5))
    first = single[0]
    compared = [
        row
        for row in single
        if (row.top_fraction, row.tau, row.ranking, row.replacement, row.positions)
        == (fraction, tau, first.ranking, first.replacement, first.positions)
    ]
    best = max(compared, key=lambda row: row.score)
    last = max(compared, key=lambda row: _layer_order(row.layer))
    return Claim(
        statement,
        "yes" if best is last else "no",
        f"Range masking, τ {tau:g}, top {fraction:g}: ΔCAcc − ΔAcc is largest at layer {best.layer} "
        f"({best.score:+.3f}); at the last, {last.layer}, it is {last.score:+.3f}.",
    )


def _standard_error(row: Row) -> float:
    """Standard error of ΔCAcc, from its 95 % interval."""
    return (row.delta_cacc_high - row.delta_cacc_low) / (2 * float(ndtri(0.975)))


def _comparable(one: Row, other: Row) -> bool:
    names = ("layer", "ranking", "replacement", "positions")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _layer_order(layer: int | str) -> int:
    return layer if isinstance(layer, int) else -1


def _with_interval(row: Row) -> str:
    if row.delta_cacc_low != row.delta_cacc_low:
        return f"{row.delta_cacc:+.3f}"
    return f"{row.delta_cacc:+.3f} [{row.delta_cacc_low:+.3f}, {row.delta_cacc_high:+.3f}]"
