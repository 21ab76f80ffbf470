"""A job's state in one file, written now and then, so that a job that was killed resumes and ends in the same bits."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from range_store.atomic_files import atomic_write

logger = logging.getLogger(__name__)

MAX_INTERVAL = 45.0
"""Seconds between two saves at most, whatever one costs: a kill loses less than a minute of work."""
MAX_COST = 0.05
"""Share of the time that saving may take, up to `MAX_INTERVAL`."""

Arrays = dict[str, npt.NDArray[Any]]
State = TypeVar("State")


def checkpoint_path(directory: Path, prefix: str, *inputs: object) -> Path:
    """The file of a job in `directory`, named by everything that its result depends on. inputs: JSON values."""
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return directory / f"{prefix}{digest[:20]}.safetensors"


class Checkpoint:
    """A file of named arrays that is replaced as a whole.

    Args:
        path: None: nothing is saved.
        seconds: least time between two saves; 0: save whenever there is a chance to.
    """

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path = path
        self._seconds = seconds
        self._saved = time.monotonic()
        self._cost = 0.0

    def load(self, restore: Callable[[Arrays], State], fresh: State) -> State:
        """What `restore` makes of the saved arrays; `fresh` if there are none, or they cannot be used."""
        if self.path is None or not self.path.exists():
            return fresh
        try:
            return restore(load_file(self.path))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("cannot read the checkpoint %s (%s): starting over", self.path, error)
            return fresh

    def save_if_due(self, arrays: Callable[[], Arrays]) -> None:
        """Save if enough time has passed. arrays: called for the state to save."""
        interval = min(max(self._seconds, self._cost / MAX_COST), max(MAX_INTERVAL, self._seconds))
        if self.path is not None and (not self._seconds or time.monotonic() - self._saved >= interval):
            self.save(arrays())

    def save(self, arrays: Arrays) -> None:
        """Replace the file. Raises OSError, naming the file, if it cannot be written."""
        if self.path is None:
            return
        started = time.monotonic()
        with atomic_write(self.path) as partial:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
        self._saved = time.monotonic()
        self._cost = self._saved - started
