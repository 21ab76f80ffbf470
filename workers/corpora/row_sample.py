"""A random sample of a corpus's rows, drawn in the one pass that reads it, before its length is known."""

import heapq
from collections.abc import Sequence

import numpy as np

MIN_ROWS = 128
MAX_ROWS = 1024
SHARE = 16
"""One row in so many is sampled, within the limits above."""
SEED = 0


def sample_size(rows: int) -> int:
    """Number of rows of a sample that stands for a corpus of `rows` rows."""
    return min(MAX_ROWS, max(MIN_ROWS, rows // SHARE))


class RowSample:
    """The rows with the smallest of the random numbers that a seeded generator gives to each row.

    The n smallest of them are a sample of n rows without replacement, for any n.
    """

    def __init__(self) -> None:
        self._smallest: list[tuple[float, int, str, str]] = []

    def update(self, first: int, texts: Sequence[str], concepts: Sequence[str]) -> None:
        """Add rows `first`, `first` + 1, …, a chunk of the corpus."""
        numbers = np.random.default_rng((SEED, first)).random(len(texts))
        limit = self._smallest[-1][0] if len(self._smallest) == MAX_ROWS else 1.0
        new = [
            (float(numbers[at]), first + at, texts[at], concepts[at]) for at in np.flatnonzero(numbers < limit).tolist()
        ]
        self._smallest = heapq.nsmallest(MAX_ROWS, self._smallest + new)

    def rows(self, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Texts and concepts of a sample of `size` rows, in the order of the corpus."""
        chosen = sorted(self._smallest[:size], key=lambda row: row[1])
        return tuple(row[2] for row in chosen), tuple(row[3] for row in chosen)
