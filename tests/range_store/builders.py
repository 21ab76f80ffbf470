"""Small, valid range sets: the statistics of random hidden states."""

from collections.abc import Sequence

import numpy as np

from range_store.domain.erasure import STATISTICAL_RANKINGS, Ranking
from range_store.domain.range_set import (
    CorpusIdentity,
    FitSettings,
    InspectLayer,
    ModelIdentity,
    Provenance,
    RangeSet,
    ServeLayer,
)
from range_store.domain.rankings import saliency
from range_store.storage.codec import assemble

CONCEPTS = ("Business", "Sci/Tech", "Sports", "World")
FINGERPRINT = "ab" * 32
"""Default fingerprint of the model of a random range set."""


def random_provenance(
    seed: int,
    concepts: Sequence[str] = CONCEPTS,
    hidden: int = 12,
    n_layers: int = 3,
    layers: Sequence[int] | None = None,
    rankings: Sequence[Ranking] = STATISTICAL_RANKINGS,
    fingerprint: str = FINGERPRINT,
    bins: int = 6,
) -> Provenance:
    """The provenance of a fit on up to 40 texts per concept."""
    rng = np.random.default_rng(seed)
    counts = {concept: int(rng.integers(1, 40)) for concept in concepts}
    return Provenance(
        model=ModelIdentity(
            id="tiny-news",
            revision=None,
            kind="sequence-classification",
            family="bert",
            fingerprint=fingerprint,
            labels=tuple(concepts),
            n_layers=n_layers,
            hidden_size=hidden,
        ),
        corpus=CorpusIdentity(
            name="random", split="train", sha256="cd" * 32, rows=sum(counts.values()), truncated=0, counts=counts
        ),
        settings=FitSettings(
            layers=tuple(range(n_layers)) if layers is None else tuple(layers),
            rankings=tuple(rankings),
            dtype="float32",
            bins=bins,
            batch_tokens=4096,
            block_rows=1024,
            threads=1,
        ),
        versions={"numpy": np.__version__},
        created_at=1.7e9 + seed,
    )


def random_layer(seed: int, provenance: Provenance) -> tuple[ServeLayer, InspectLayer]:
    """Statistics of normally distributed states, with a mean and spread per concept and neuron."""
    rng = np.random.default_rng(seed)
    hidden, bins = provenance.model.hidden_size, provenance.settings.bins
    counts = np.array(list(provenance.corpus.counts.values()))
    states = [rng.normal(rng.normal(0, 2, hidden), rng.uniform(0.1, 1, hidden), (n, hidden)) for n in counts]
    pooled = np.concatenate(states)
    edges = np.linspace(np.quantile(pooled, 0.1, axis=0), np.quantile(pooled, 0.9, axis=0) + 1e-9, bins + 1, axis=1)
    column = [np.stack([np.searchsorted(edges[j], x[:, j], side="right") for j in range(hidden)]) for x in states]
    histogram = np.stack([np.stack([np.bincount(row, minlength=bins + 2) for row in c]) for c in column])
    mean = np.stack([x.mean(0) for x in states])
    std = np.stack([x.std(0) for x in states])
    mean_abs = np.stack([np.abs(x).mean(0) for x in states])
    serve = ServeLayer(
        mean,
        std,
        {each: saliency(each, counts, mean, std, mean_abs) for each in provenance.settings.rankings},
    )
    inspect = InspectLayer(
        mean_abs=mean_abs,
        m3=np.stack([((x - x.mean(0)) ** 3).mean(0) for x in states]),
        m4=np.stack([((x - x.mean(0)) ** 4).mean(0) for x in states]),
        minimum=np.stack([x.min(0) for x in states]),
        maximum=np.stack([x.max(0) for x in states]),
        edges=edges,
        histogram=histogram.astype(np.uint32),
    )
    return serve, inspect


def random_range_set(
    seed: int,
    concepts: Sequence[str] = CONCEPTS,
    hidden: int = 12,
    n_layers: int = 3,
    layers: Sequence[int] | None = None,
    rankings: Sequence[Ranking] = STATISTICAL_RANKINGS,
    fingerprint: str = FINGERPRINT,
    bins: int = 6,
) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """A valid range set and the other part of its layers (default: all `n_layers`). Each seed has another id."""
    provenance = random_provenance(seed, concepts, hidden, n_layers, layers, rankings, fingerprint, bins)
    parts = {layer: random_layer(1000 * seed + layer, provenance) for layer in provenance.settings.layers}
    inspect = {layer: part[1] for layer, part in parts.items()}
    return assemble(provenance, {layer: part[0] for layer, part in parts.items()}, inspect), inspect


def in_dtype(
    range_set: RangeSet, inspect: dict[int, InspectLayer], dtype: str
) -> tuple[RangeSet, dict[int, InspectLayer]]:
    """The same statistics, as if fitted in another dtype."""
    settings = range_set.provenance.settings.model_copy(update={"dtype": dtype})
    return assemble(range_set.provenance.model_copy(update={"settings": settings}), range_set.layers, inspect), inspect
