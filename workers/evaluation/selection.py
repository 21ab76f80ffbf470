"""Choosing a setting, on texts that are neither fitted nor measured (METHOD "Traps": never on the test split)."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.evaluation.measures import MEAN, Row


@dataclass(frozen=True)
class Choice:
    """The setting of one method that did best on the selection texts, out of `candidates`.

    `setting` is `Row.setting`: (layer, ranking, method, τ, top_fraction, replacement, positions). `score` is
    ΔCAcc − ΔAcc on the selection texts, mean over targets: what the target loses, less what the others lose.
    """

    method: str
    setting: tuple[int | str, str, str, float | None, float, str, str]
    score: float
    candidates: int


def choose(rows: Sequence[Row]) -> tuple[Choice, ...]:
    """The best setting of each method by the mean rows of the selection texts; ties go to the earlier setting."""
    choices = []
    for method in dict.fromkeys(row.method for row in rows):
        means = [row for row in rows if row.method == method and row.target == MEAN and score(row) == score(row)]
        if means:
            best = max(means, key=score)
            choices.append(Choice(method, best.setting, score(best), len(means)))
    return tuple(choices)


def score(row: Row) -> float:
    """What the target loses in accuracy, less what the others lose; 1 at most where base accuracy is 1."""
    return row.delta_cacc - row.delta_acc
