"""What a fit, a training or an evaluation reports to its caller while it runs."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        phase: what is being done, as shown to a user.
        done, total: rows; optimiser steps of a training; batches while its accuracy is measured. 0 where unknown.
        seconds: since this run of the job started.
        resumed: the part of `done` that an earlier run did.
        share: of the work, in [0, 1]. It is finer than done / total where a long text is more work than a short one.
    """

    phase: str
    done: int
    total: int
    seconds: float
    resumed: int
    share: float


ProgressCallback = Callable[[Progress], None]
"""Called after every piece of work. What it raises stops the job; its checkpoint remains, and the job can resume."""
