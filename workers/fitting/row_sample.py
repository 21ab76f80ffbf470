"""A sample of a corpus's rows, drawn while it is read: nothing is read twice, and its length need not be known."""

import heapq
from collections.abc import Sequence

import numpy as np

MAX_ROWS = 1024
"""Rows that are kept at most."""
MIN_ROWS = 128
SHARE = 16
"""One row of so many is wanted, but no fewer than `MIN_ROWS` and no more than `MAX_ROWS`."""
SEED = 0


def sample_size(rows: int) -> int:
    """How many of a corpus's rows stand for all of them."""
    return min(MAX_ROWS, max(MIN_ROWS, rows // SHARE))


class RowSample:
    """The rows with the smallest numbers, of those that a seeded generator gives to each row.

    The n smallest of them are a sample of n rows, drawn without replacement, whatever n is.
    """

    def __init__(self) -> None:
        self._drawn: list[tuple[float, int, str, str]] = []

    def update(self, first: int, texts: Sequence[str], concepts: Sequence[str]) -> None:
        """Take in rows `first`, `first` + 1, …, a chunk of the corpus."""
        numbers = np.random.default_rng((SEED, first)).random(len(texts))
        most = self._drawn[-1][0] if len(self._drawn) == MAX_ROWS else 1.0
        new = [
            (float(numbers[at]), first + at, texts[at], concepts[at]) for at in np.flatnonzero(numbers < most).tolist()
        ]
        self._drawn = heapq.nsmallest(MAX_ROWS, self._drawn + new)

    def rows(self, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Texts and concepts of so many rows of the sample, in the corpus's order."""
        chosen = sorted(self._drawn[:size], key=lambda drawn: drawn[1])
        return tuple(drawn[2] for drawn in chosen), tuple(drawn[3] for drawn in chosen)
