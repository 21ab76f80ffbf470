"""A sample of rows depends on the rows alone, and stands for all of them."""

import numpy as np
import pytest

from workers.corpora.row_sample import MAX_ROWS, RowSample, sample_size


def drawn(rows: int, size: int, chunk: int = 1024) -> list[int]:
    sample = RowSample()
    for first in range(0, rows, chunk):
        here = [str(row) for row in range(first, min(first + chunk, rows))]
        sample.update(first, here, [f"concept of {row}" for row in here])
    texts, concepts = sample.rows(size)
    assert concepts == tuple(f"concept of {text}" for text in texts)
    return [int(text) for text in texts]


@pytest.mark.parametrize(("rows", "size"), [(5, 128), (700, 128), (1500, 128), (20_000, 1024), (20_000, 200)])
def test_rows_are_distinct_in_order_and_as_many_as_wanted(rows: int, size: int) -> None:
    found = drawn(rows, size)
    assert found == sorted(set(found))
    assert len(found) == min(rows, size, MAX_ROWS)
    assert all(0 <= row < rows for row in found)
    assert found == drawn(rows, size)


def test_every_part_of_the_corpus_is_drawn_from_alike() -> None:
    parts = np.histogram(drawn(64_000, 1024), bins=8, range=(0, 64_000))[0]
    assert parts.min() > 128 - 4 * 11, "four standard deviations"
    assert parts.max() < 128 + 4 * 11


def test_smaller_sample_is_a_part_of_the_larger() -> None:
    assert set(drawn(5000, 128)) < set(drawn(5000, 1024))


@pytest.mark.parametrize(("rows", "wanted"), [(1025, 128), (2048, 128), (4096, 256), (16_384, 1024), (10**8, 1024)])
def test_a_sixteenth_is_wanted_within_bounds(rows: int, wanted: int) -> None:
    assert sample_size(rows) == wanted
