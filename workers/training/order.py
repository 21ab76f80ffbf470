"""The order of the training texts. It depends only on seed and epoch, so a resumed training sees the same batches."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

POOL = 50
"""Batches that are drawn together and sorted by length: little padding, and the order is still random."""


class LengthPools(Sampler[int]):
    """Draws rows in random pools, sorts each pool by length, cuts it into batches and shuffles the batches.

    Args:
        lengths: tokens of each row.
        batch: rows of a step.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch, self._seed, self._epoch = batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self._seed, self._epoch))
        rows = rng.permutation(len(self._lengths))
        pool = self._batch * POOL
        batches: list[np.ndarray] = []
        for start in range(0, len(rows), pool):
            own = rows[start : start + pool]
            own = own[np.argsort(-self._lengths[own], kind="stable")]
            batches += [own[first : first + self._batch] for first in range(0, len(own), self._batch)]
        last = [batches.pop()] if len(batches) > 1 and len(batches[-1]) < self._batch else []
        order = [
            batches[index] for index in rng.permutation(len(batches))
        ] + last  # the Trainer expects a short batch at the end
        for each in order:
            yield from each.tolist()
