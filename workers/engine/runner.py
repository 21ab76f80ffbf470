"""One batch through the model: the trunk once, a tail for every text with erasures, and the replies."""

import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from range_store.domain.plan import Plan
from workers.edits.slot_table import SlotTable
from workers.edits.variants import Outcome, Variants
from workers.engine.answers import Logits, TextAnswer
from workers.engine.enforcing import cap_labels
from workers.engine.errors import EngineFailed
from workers.engine.metrics import EngineMetrics
from workers.engine.requests import Text, fail, reply
from workers.engine.settings import EngineSettings
from workers.engine.trunk_cache import TrunkCache
from workers.models.loading import LoadedModel
from workers.models.predictions import predicted_labels
from workers.models.prepack import rounded
from workers.models.steerable import Trunk
from workers.models.tokens import TokenBatch

logger = logging.getLogger(__name__)


class BatchRunner:
    """Runs batches on the model's thread."""

    def __init__(self, model: LoadedModel, settings: EngineSettings, metrics: EngineMetrics) -> None:
        self._model, self._settings, self._metrics = model, settings, metrics
        self._slots = SlotTable(model.identity.hidden_size, model.device, settings.plan_cache_bytes)
        self._watch = random.Random(0)
        self._cache: TrunkCache | None = None
        if settings.trunk_cache_bytes and model.steered.keeps_trunks:
            self._cache = TrunkCache(model.steered, model.tokens, settings.trunk_cache_bytes)

    def warm_up(self) -> None:
        """Run a small batch; raises whatever the model does."""
        self._model.steered.logits(self._model.tokens.batch(self._model.tokens.encode(["warm-up"]), self._model.device))

    def answer(self, batch: list[Text]) -> None:
        """Run a batch and reply. If it raises, halves are tried, so that only the text that causes it fails."""
        started = time.monotonic()
        for text in batch:
            text.request.stage = "running"
            if text.request.began is None:
                text.request.began = started
            self._metrics.queue_wait.observe(started - text.admitted)
        try:
            answers = self._forward(batch)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            if len(batch) > 1:
                middle = len(batch) // 2
                self.answer(batch[:middle])
                self.answer(batch[middle:])
                return
            failed = batch[0].request
            message = "a text of %d tokens failed: %s"
            failed.context.run(logger.error, message, batch[0].tokens, type(error).__name__, exc_info=error)
            fail([(failed, EngineFailed("the model failed on this text"))])
            self.warm_up()  # a device that fails on any text ends the engine
            return
        done = time.monotonic()
        self._observe(batch, answers, done - started)
        replied = self._metrics.stage.labels("reply")
        reply(list(zip(batch, answers, strict=True)), lambda: replied.observe(time.monotonic() - done))

    def _forward(self, batch: list[Text]) -> list[TextAnswer]:
        tokens = self._model.tokens.batch([text.encoded for text in batch], self._model.device)
        edited = [row for row, text in enumerate(batch) if text.plan_key]
        watched = bool(edited) and self._watch.random() < self._settings.watched_batches
        bare = watched or any(text.compare or not text.plan_key for text in batch)
        with self._timed("trunk"):
            trunk = self._trunk(batch, tokens, whole=bare)
        base: Logits | None = None if trunk.logits is None else trunk.logits.float().cpu().numpy()
        erased: dict[int, Logits] = {}
        masked: dict[int, int] = {}
        if edited:
            with self._timed("tail"):
                outcome = self._steer(tokens, trunk, {row: batch[row].plan for row in edited})
                erased = dict(zip(edited, _logits(outcome), strict=True))
                masked = dict(zip(edited, outcome.masked[:, 0].tolist(), strict=True))
            self._metrics.count(self._metrics.masked, outcome.by_concept)
            self._metrics.count(self._metrics.maskable, outcome.possible)
            self._enforce(batch, erased, tokens, trunk)
        answers = []
        for row, text in enumerate(batch):
            logits = erased.get(row)
            if logits is None:
                assert base is not None
                logits = base[row]
            baseline = base[row] if base is not None and text.compare else None
            answers.append(TextAnswer(logits, baseline, masked.get(row, 0), text.encoded.truncated, text.tokens))
        if base is not None and edited:
            self._count_changes(batch, base, answers, watched)
        return answers

    def _enforce(self, batch: list[Text], erased: dict[int, Logits], tokens: TokenBatch, trunk: Trunk) -> None:
        """Cap in `erased`, by row, the labels that the enforced erasures of a text alone leave lower."""
        guards = {row: guard for row in erased if (guard := batch[row].guard) is not None}
        if not guards:
            return
        outcome = self._steer(tokens, trunk, guards)
        for row, alone in zip(guards, _logits(outcome), strict=True):
            enforced = batch[row].request.admission.enforced
            labels = [index for index, name in enumerate(self._model.identity.labels) if name in enforced]
            erased[row] = cap_labels(erased[row], alone, labels)

    def _steer(self, tokens: TokenBatch, trunk: Trunk, plans: dict[int, Plan]) -> Outcome:
        """Run texts of the batch, by row, under plans."""
        rows = torch.tensor(list(plans), device=tokens.ids.device).unsqueeze(1)
        variants = Variants(self._model.steered, self._slots, tokens, trunk, list(plans.values()), rows)
        return variants.run_all(self._settings.max_batch_tokens)

    def _trunk(self, batch: list[Text], tokens: TokenBatch, *, whole: bool) -> Trunk:
        split = batch[0].split
        if self._cache is None or split is None:
            return self._model.steered.trunk(tokens, split, whole=whole)
        hits, misses = self._cache.hits, self._cache.misses
        trunk = self._cache.trunk(tokens, [text.encoded for text in batch], split, whole=whole)
        self._metrics.trunk_cache_hits.inc(self._cache.hits - hits)
        self._metrics.trunk_cache_misses.inc(self._cache.misses - misses)
        self._metrics.trunk_cache_bytes.set(self._cache.nbytes)
        return trunk

    def _count_changes(self, batch: list[Text], base: Logits, answers: list[TextAnswer], watched: bool) -> None:
        """Count, by erased concept, the texts whose label differs from the bare model's."""
        head = self._model.head
        seen, changed = Counter[str](), Counter[str]()
        for row, (text, answer) in enumerate(zip(batch, answers, strict=True)):
            if watched or text.compare:
                concepts = [erasure.concept for erasure in text.plan.erasures]
                seen.update(concepts)
                if predicted_labels(answer.logits, head) != predicted_labels(base[row], head):
                    changed.update(concepts)
        self._metrics.count(self._metrics.watched, seen)
        self._metrics.count(
            self._metrics.changed, {concept: changed[concept] for concept in seen}
        )  # zeros too: a ratio

    def _observe(self, batch: list[Text], answers: list[TextAnswer], seconds: float) -> None:
        tokens = sum(text.tokens for text in batch)
        padded = rounded(tokens) if self._model.steered.packs else max(text.tokens for text in batch) * len(batch)
        self._metrics.forward.observe(seconds)
        self._metrics.batch_texts.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_plans.observe(len({text.plan_key for text in batch} - {""}))
        self._metrics.tokens.inc(tokens)
        self._metrics.padded_tokens.inc(padded)
        self._metrics.masked_neurons.inc(sum(answer.masked_neurons for answer in answers))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._metrics.stage.labels(stage).observe(time.monotonic() - started)


def _logits(outcome: Outcome) -> Logits:
    """Of variants with one text each, [G, K]."""
    logits: Logits = outcome.logits[:, 0].float().cpu().numpy()
    return logits
