"""A service as the routes see it, and the names of `workers` that they need. Nothing here imports torch.

`app.serving.serve` opens one with an engine in this process, `app.serving.fleet` one with engines on Ray.
"""

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from app.jobs.runner import FitRunner
from app.live.feed import ChangeFeed
from app.security.keyring import Keyring
from app.settings import Settings
from range_store.domain.range_set import RangeSet
from range_store.errors import NoRangeSet, StoreUnavailable
from range_store.storage.jobs import JobStore
from range_store.storage.mirror import Mirror, Snapshot
from range_store.storage.store import RangeStore
from workers.corpora.paper_datasets import PAPER_DATASETS
from workers.engine.answers import Answer, Answerer, Logits, TextAnswer
from workers.engine.errors import (
    Draining,
)
from workers.engine.live_metrics import add_model_label, live_state_metrics, model_metric, register_process_metrics
from workers.engine.metrics import MAX_CONCEPTS, OTHER_CONCEPTS
from workers.models.facts import ModelFacts
from workers.models.predictions import CHANCE, Activation
from workers.models.texts import TextOrPair, TokenInfo, characters

__all__ = [
    "CHANCE",
    "KNOWN_DATA_SETS",
    "MAX_CONCEPTS",
    "OTHER_CONCEPTS",
    "Activation",
    "Answer",
    "Answerer",
    "Draining",
    "Logits",
    "ModelFacts",
    "Service",
    "TextAnswer",
    "TextOrPair",
    "TokenInfo",
    "add_model_label",
    "characters",
    "live_state_metrics",
    "model_metric",
    "register_process_metrics",
]

KNOWN_DATA_SETS = tuple(PAPER_DATASETS)
"""Names that a job's `dataset` may be."""


@dataclass(frozen=True, eq=False)
class Service:
    """Everything that serves one model: store, mirror of the live state, keys, engine, fits.

    A process may have several, each with a registry of its own; they may share the keyring.
    """

    settings: Settings
    model: ModelFacts
    store: RangeStore
    mirror: Mirror
    keyring: Keyring
    engine: Answerer
    registry: CollectorRegistry
    name: str
    feed: ChangeFeed
    jobs: JobStore
    fits: FitRunner
    started_at: float = field(default_factory=time.time)
    """Unix seconds."""

    def require_snapshot(self) -> Snapshot:
        """The current snapshot; raises StoreUnavailable if the live state was never read."""
        if (snapshot := self.mirror.snapshot) is None:
            raise StoreUnavailable("the live state was never read: the store cannot be reached")
        return snapshot

    def require_range_set(self) -> RangeSet:
        """The active range set; raises NoRangeSet if there is none."""
        if (range_set := self.require_snapshot().range_set) is None:
            raise NoRangeSet()
        return range_set

    def drain(self) -> None:
        """Accept no new requests, and leave the replicas that changes wait for. Safe in a signal handler."""
        self.engine.drain()
        self.mirror.withdraw()
