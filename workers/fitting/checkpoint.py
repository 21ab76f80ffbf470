"""A fit's statistics so far in one file, so that a fit that was killed goes on and ends in the very same bits."""

import hashlib
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from range_store.atomic_files import atomic_write, make_private_directory, remove_partial_files
from range_store.domain.range_set import FitSettings, ModelIdentity
from workers.fitting.corpus import Corpus
from workers.fitting.fitter import RangeFitter

logger = logging.getLogger(__name__)

LONGEST = 45.0
"""Seconds between two checkpoints at most, whatever one costs: a kill loses less than a minute."""


@dataclass(eq=False)
class ChunkStates:
    """States [n, L, D] of one chunk's texts, as far as they are recorded.

    done: texts whose batch went through, [n]; kept: those of them that count (they have tokens and, if only these
    are wanted, the model gets them right), [n].
    """

    states: npt.NDArray[np.float32]
    done: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]

    @classmethod
    def empty(cls, texts: int, layers: int, hidden: int) -> "ChunkStates":
        flags = np.zeros(texts, dtype=np.bool_)
        return cls(np.zeros((texts, layers, hidden), dtype=np.float32), flags, flags.copy())


@dataclass
class Counters:
    """How far the fit is: chunks counted in; and texts so far that were cut, or had no token."""

    next_chunk: int = 0
    truncated: int = 0
    empty: int = 0


@dataclass
class Checkpoint:
    """One file, named by everything that the result depends on.

    Args:
        seconds: least time between two of them; one that is slow to write is written less often, down to `LONGEST`;
            0: at every batch.
    """

    path: Path
    seconds: float
    saved: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    @classmethod
    def of(
        cls, directory: Path, model: ModelIdentity, corpus: Corpus, settings: FitSettings, seconds: float
    ) -> "Checkpoint":
        make_private_directory(directory)
        remove_partial_files(directory, "fit-*")
        what = json.dumps([model.fingerprint, corpus.sha256, settings.model_dump(mode="json")])
        return cls(directory / f"fit-{hashlib.sha256(what.encode()).hexdigest()[:20]}.safetensors", seconds)

    def load(self, fitter: RangeFitter) -> tuple[Counters, ChunkStates | None]:
        """Put the saved statistics into `fitter`; gives how far it was, and the chunk that was under way."""
        if not self.path.exists():
            return Counters(), None
        try:
            arrays = load_file(self.path)
            counters = Counters(*(arrays[f"counters.{name}"].item() for name in vars(Counters())))
            names = ("states", "done", "kept")
            chunk = ChunkStates(*(arrays[f"chunk.{n}"].copy() for n in names)) if "chunk.states" in arrays else None
            fitter.restore(arrays)
            return counters, chunk
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("the checkpoint %s cannot be read (%s): starting over", self.path, error)
            return Counters(), None

    @property
    def due(self) -> bool:
        """It is time for the next one: writing takes a twentieth of the time at most, up to `LONGEST`."""
        every = min(max(self.seconds, 20 * self.cost), max(LONGEST, self.seconds)) if self.seconds else 0.0
        return time.monotonic() - self.saved >= every

    def save(self, fitter: RangeFitter, counters: Counters, chunk: ChunkStates | None) -> None:
        """Write it whole or not at all.

        Raises:
            OSError: it cannot be written; names the file.
        """
        started = time.monotonic()
        arrays: dict[str, npt.NDArray[Any]] = fitter.arrays()
        arrays |= {f"counters.{name}": np.array(value) for name, value in vars(counters).items()}
        if chunk is not None:
            arrays |= {f"chunk.{name}": getattr(chunk, name) for name in ("states", "done", "kept")}
        with atomic_write(self.path) as partial:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
        self.saved = time.monotonic()
        self.cost = self.saved - started
