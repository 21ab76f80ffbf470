"""Selects a setting on texts that are neither fitted nor measured: a choice on test texts would flatter the result."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.evaluation.measures import MEAN, Row


@dataclass(frozen=True)
class SelectedSetting:
    """The best setting of one method on the selection texts, out of `candidates`.

    `setting` is `Row.setting`: (layer, ranking, method, τ, top_fraction, replacement, positions). `score` is
    `Row.score` of its mean row.
    """

    method: str
    setting: tuple[int | str, str, str, float | None, float, str, str]
    score: float
    candidates: int


def select_settings(rows: Sequence[Row]) -> tuple[SelectedSetting, ...]:
    """The best setting of each method by the mean rows of the selection texts; of equal ones, the earlier."""
    selected = []
    for method in dict.fromkeys(row.method for row in rows):
        means = [row for row in rows if row.method == method and row.target == MEAN and row.score == row.score]
        if means:
            best = max(means, key=lambda row: row.score)
            selected.append(SelectedSetting(method, best.setting, best.score, len(means)))
    return tuple(selected)
