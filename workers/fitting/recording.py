"""Forward passes of a fit: the hidden states of a chunk's texts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from range_store.domain.range_set import FitSettings
from workers.corpora.corpus import Chunk
from workers.models.loading import LoadedModel
from workers.models.predictions import predicted_labels


@dataclass(eq=False)
class ChunkStates:
    """States [n, L, D] of one chunk's n texts, as far as they are recorded.

    Attributes:
        done: whether a text's batch has run, [n].
        kept: whether a text counts, [n]: it has tokens and, if only correct texts are wanted, the model gets it right.
        truncated, empty: number of texts that were cut, and that have no token.
    """

    states: npt.NDArray[np.float32]
    done: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    truncated: int = 0
    empty: int = 0

    @classmethod
    def allocate(cls, texts: int, layers: int, hidden: int) -> "ChunkStates":
        """Nothing recorded yet."""
        flags = np.zeros(texts, dtype=np.bool_)
        return cls(np.zeros((texts, layers, hidden), dtype=np.float32), flags, flags.copy())


def record_chunk(
    model: LoadedModel,
    chunk: Chunk,
    settings: FitSettings,
    unfinished: ChunkStates | None = None,
    after_batch: Callable[[ChunkStates], None] = lambda states: None,
) -> ChunkStates:
    """The states of every text of a chunk.

    Args:
        unfinished: what an earlier run recorded of this chunk; it is completed in place.
    """
    encoded = model.tokens.encode(chunk.texts, keep_empty=True)
    found = unfinished or ChunkStates.allocate(len(encoded), len(settings.layers), model.identity.hidden_size)
    found.truncated = sum(text.truncated for text in encoded)
    found.empty = sum(not text.ids for text in encoded)
    for rows, batch in model.tokens.batches(encoded, settings.batch_tokens, model.device):
        if found.done[rows].all():
            continue
        logits, recorded = model.steered.record(batch, settings.layers, settings.site, settings.position)
        for index, layer in enumerate(settings.layers):
            found.states[rows, index] = recorded[layer].float().cpu().numpy()
        found.kept[rows] = True
        if settings.texts == "correct":
            truth = [model.identity.labels.index(chunk.concepts[row]) for row in rows]
            found.kept[rows] = predicted_labels(logits.float().cpu().numpy(), model.head) == truth
        found.done[rows] = True
        after_batch(found)
    return found


def record_sample(model: LoadedModel, sample: Chunk, settings: FitSettings) -> npt.NDArray[np.float32]:
    """States [n, L, D] of those texts of a sample that count."""
    found = record_chunk(model, sample, settings)
    return found.states[found.kept]
