"""A running engine for tests, random erasures, and the reference answer of a single text."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from range_store.domain.erasure import Damp, Erasure
from range_store.domain.plan import resolve
from range_store.domain.range_set import RangeSet
from range_store.storage.mirror import Mirror
from range_store.storage.store import RangeStore
from tests.workers.checkpoints import LABELS
from tests.workers.masking import Alike
from tests.workers.texts import labelled_texts
from workers.engine.answers import Answer
from workers.engine.engine import Engine
from workers.models.loading import LoadedModel
from workers.models.texts import TextOrPair

TOLERANCE = 2e-4
"""Largest difference of a logit in float32 between a text in a batch and the same text alone."""
NEAR = 1e-4
"""A state this near to a bound of a range may fall on either side of it, by rounding."""
TEXTS = [text for text, _ in labelled_texts(40, seed=9)]


@dataclass
class Running:
    engine: Engine
    store: RangeStore
    mirror: Mirror
    range_set: RangeSet
    model: LoadedModel
    registry: CollectorRegistry

    def ask(self, texts: Sequence[TextOrPair], erase: list[Erasure] | None = None, **options: Any) -> Answer:
        return asyncio.run(self.engine.classify(texts, erase, **options))

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the engine's metrics."""
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep the model busy with a text of its own, so that later requests wait in the queue."""
        waited = self.engine.metrics.queue_wait._sum.get()
        with self.model.steered._lock:
            busy = asyncio.create_task(self.engine.classify(["busy"], []))
            while self.engine.metrics.queue_wait._sum.get() == waited:
                await asyncio.sleep(0)
            yield
        await busy


def random_erasures(rng: random.Random) -> list[Erasure]:
    return [
        Erasure(
            concept=concept,
            method=rng.choice(["range", "range", "neuron"]),
            tau=rng.choice([0.5, 1.0, 2.5]),
            top_fraction=rng.choice([0.1, 0.3, 1.0]),
            ranking=rng.choice(["max", "probeless", "selectivity"]),
            layers=rng.choice([(-1,), (-1,), (0,), (1, 2), "all"]),
            replacement=rng.choice(["zero", "mean", Damp(damp=0.5)]),
        )
        for concept in rng.sample(LABELS, rng.randrange(0, 4))
    ]


def alone(service: Running, text: TextOrPair, erasures: list[Erasure]) -> tuple[np.ndarray, float]:
    """Logits of one text or pair by itself, and the smallest distance of its states to a bound of the plan."""
    model = service.model
    batch = model.tokens.batch(model.tokens.encode([text]))
    plan = resolve(service.range_set, erasures)
    nearest = [np.inf]

    class Masking(Alike):
        layers = plan.edits.keys()

        def __call__(self, layer: int, hidden: torch.Tensor, tokens: Any) -> torch.Tensor:
            mask, result = plan.edits[layer], hidden
            done = torch.zeros_like(hidden, dtype=torch.bool)
            for i in range(len(mask.low)):
                low, high = torch.from_numpy(mask.low[i]), torch.from_numpy(mask.high[i])
                always = torch.from_numpy(mask.always[i])
                gaps = torch.minimum((hidden - low).abs(), (hidden - high).abs())[..., ~always]
                if gaps.numel():
                    nearest.append(float(gaps.min()))
                hit = (((hidden >= low) & (hidden <= high)) | always) & ~done
                becomes = torch.from_numpy(mask.scale[i]) * hidden + torch.from_numpy(mask.offset[i])
                result, done = torch.where(hit, becomes.to(hidden.dtype), result), done | hit
            return result

    logits = model.steered.hooked(batch, Masking()) if plan.edits else model.steered.logits(batch)
    return logits[0].float().numpy(), min(nearest)
