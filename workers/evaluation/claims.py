"""The paper's claims, each with a yes or a no on this model and these texts (METHOD "Claims to test")."""

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
"""Chance of a yes to interference where there is no gain in any setting."""
PAST = 0.5
"""Share of the neurons beyond which neuron masking is said to collapse."""
COLLAPSE = -0.25
"""Fall of the others' accuracy that is called a collapse."""
HOLD = -0.05
"""Fall of the others' accuracy that still counts as holding."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what was found here, and by which figures."""

    statement: str
    verdict: Verdict
    evidence: str


def claims(rows: Sequence[Row], range_set: RangeSet, inspect: Mapping[int, InspectLayer]) -> list[Claim]:
    """All four, in the paper's order; "not measured" where the rows do not hold what a claim needs."""
    means = [row for row in rows if row.target == MEAN and row.delta_cacc == row.delta_cacc]
    return [interference(means), collapse(means), separable(means, range_set), last_layer(means)]


def interference(means: Sequence[Row]) -> Claim:
    """Yes where the largest gain of range over neuron masking in CAcc, over like settings, is significantly above 0.

    It is the largest of many, so that the level is divided by their number (Bonferroni). Each gain's standard error is
    that of two independent measurements, from the widths of their intervals: both are of the same texts, which makes
    it too large rather than too small.
    """
    statement = "Range masking interferes less with other concepts than neuron masking (the paper: by up to 25 points)."
    pairs = [
        (ranged.delta_cacc - neuron.delta_cacc, ranged, neuron)
        for ranged in means
        if ranged.method == "range"
        for neuron in means
        if neuron.method == "neuron" and _alike(ranged, neuron) and neuron.top_fraction == ranged.top_fraction
    ]
    if not pairs:
        return Claim(statement, "not measured", "Needs both methods at one setting.")
    gain, ranged, neuron = max(pairs, key=lambda pair: pair[0])
    error = math.hypot(_standard_error(ranged), _standard_error(neuron))
    least = gain - float(ndtri(1 - LEVEL / len(pairs))) * error
    known = not math.isnan(least)  # there are intervals
    corrected = f", corrected for {len(pairs)} settings" if len(pairs) > 1 else ""
    bound = f", at least {100 * least:+.1f} with 95 % confidence{corrected}" if known else ""
    return Claim(
        statement,
        "yes" if (least if known else gain) > 0 else "no",
        f"At most {100 * gain:+.1f} points of the others' accuracy{bound}: {_with_interval(ranged)} with ranges, "
        f"{_with_interval(neuron)} with neurons ({_where(ranged)}).",
    )


def collapse(means: Sequence[Row]) -> Claim:
    """Yes where, at the last layer, neuron masking costs the others 25 points or more at most of the measured fractions
    beyond a half, and range masking, at its smallest measured τ of 2 or more, never more than 5, up to all neurons."""
    statement = "Neuron masking collapses past 50 % of the neurons, while range masking holds to 100 %."
    beyond = [row for row in means if row.top_fraction > PAST]
    ranged = [row for row in beyond if row.method == "range" and (row.tau or 0) >= 2]
    neuron = [row for row in beyond if row.method == "neuron"]
    if not neuron or not any(row.top_fraction == 1.0 for row in ranged):
        return Claim(statement, "not measured", "Needs both methods beyond half of the neurons, up to all of them.")
    layer = max(neuron + ranged, key=lambda row: _layer_order(row.layer)).layer
    tau = min(row.tau or 0 for row in ranged)
    first = next(row for row in neuron + ranged if row.layer == layer)
    neuron = [row for row in neuron if row.layer == layer and _alike(row, first)]
    ranged = [row for row in ranged if row.layer == layer and _alike(row, first) and row.tau == tau]
    if not neuron or not ranged:
        return Claim(statement, "not measured", "Needs both methods at one setting.")
    collapsed = [row.top_fraction for row in neuron if row.delta_cacc <= COLLAPSE]
    worst = min(ranged, key=lambda row: row.delta_cacc)
    yes = 2 * len(collapsed) > len(neuron) and worst.delta_cacc >= HOLD
    since = f", from top {min(collapsed):g} on" if collapsed else ""
    at_all = max(neuron, key=lambda row: row.top_fraction)
    return Claim(
        statement,
        "yes" if yes else "no",
        f"Layer {layer}, {first.ranking}: neuron masking costs the others 25 points or more at {len(collapsed)} of "
        f"{len(neuron)} measured fractions beyond a half{since} ({_with_interval(at_all)} at top "
        f"{at_all.top_fraction:g}); range masking (τ {tau:g}) {_with_interval(worst)} at worst, at top "
        f"{worst.top_fraction:g}.",
    )


def separable(means: Sequence[Row], range_set: RangeSet) -> Claim:
    """Yes where, at the last fitted layer, the mean overlap coefficient of two concepts' ranges is smaller over the top
    5 % of each ranking's neurons than over its bottom 5 %, in every fitted ranking."""
    statement = "Ranges of different concepts overlap less for top than for bottom neurons."
    if len(range_set.concepts) < 2:
        return Claim(statement, "not measured", "Needs two concepts.")
    layer = max(range_set.layers)
    found = [range_overlap(range_set, layer, ranking) for ranking in range_set.provenance.settings.rankings]
    yes = all(each.top < each.bottom for each in found)
    said = "; ".join(f"{each.ranking} {each.top:.3f} against {each.bottom:.3f}" for each in found)
    return Claim(
        statement,
        "yes" if yes else "no",
        f"Layer {layer}, τ 2.5, {found[0].neurons} neurons each, mean overlap coefficient at the top against the "
        f"bottom: {said}.",
    )


def last_layer(means: Sequence[Row]) -> Claim:
    """Yes where, for range masking at the largest measured fraction, ΔCAcc − ΔAcc is largest at the last layer."""
    statement = "The last layer is the best place to mask."
    single = [row for row in means if isinstance(row.layer, int) and row.method == "range"]
    if len({row.layer for row in single}) < 2:
        return Claim(statement, "not measured", "Needs several layers.")
    fraction = max(row.top_fraction for row in single)
    tau = min((row.tau or 0 for row in single), key=lambda tau: abs(tau - 2.5))
    first = single[0]
    like = [
        row
        for row in single
        if (row.top_fraction, row.tau, row.ranking, row.replacement, row.positions)
        == (fraction, tau, first.ranking, first.replacement, first.positions)
    ]
    best = max(like, key=lambda row: row.delta_cacc - row.delta_acc)
    last = max(like, key=lambda row: _layer_order(row.layer))
    return Claim(
        statement,
        "yes" if best is last else "no",
        f"Range masking, τ {tau:g}, top {fraction:g}: ΔCAcc − ΔAcc is largest at layer {best.layer} "
        f"({best.delta_cacc - best.delta_acc:+.3f}); at the last, {last.layer}, it is "
        f"{last.delta_cacc - last.delta_acc:+.3f}.",
    )


def _standard_error(row: Row) -> float:
    """Of ΔCAcc, from its 95 % interval."""
    return (row.delta_cacc_high - row.delta_cacc_low) / (2 * float(ndtri(0.975)))


def _alike(one: Row, other: Row) -> bool:
    names = ("layer", "ranking", "replacement", "positions")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _layer_order(layer: int | str) -> int:
    return layer if isinstance(layer, int) else -1


def _with_interval(row: Row) -> str:
    if row.delta_cacc_low != row.delta_cacc_low:
        return f"{row.delta_cacc:+.3f}"
    return f"{row.delta_cacc:+.3f} [{row.delta_cacc_low:+.3f}, {row.delta_cacc_high:+.3f}]"


def _where(row: Row) -> str:
    return f"layer {row.layer}, {row.ranking}, τ {row.tau:g}, top {row.top_fraction:g}"
