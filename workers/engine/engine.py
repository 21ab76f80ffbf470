"""The engine: admits requests, freezes their plans, batches their texts, and answers.

Three kinds of thread: the event loop admits and replies, one thread tokenizes, one runs the model. Nothing on the
event loop waits for torch (promise 9), and a batch wakes it once, not once per text.
"""

import asyncio
import logging
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from range_store.domain.erasure import Erasure
from range_store.storage.mirror import Mirror
from workers.engine.admission import Planner
from workers.engine.answers import Answer, Load, Logits, TextAnswer
from workers.engine.enforcing import capped
from workers.engine.errands import Errand
from workers.engine.errors import DeadlineExceeded, Draining, EngineError, EngineFailed, QueueFull, RequestTooLarge
from workers.engine.forward import WHOLE_PASS, Variant, open_trunk, steer_variants
from workers.engine.looking import Looking
from workers.engine.metrics import EngineMetrics
from workers.engine.queue import BatchQueue
from workers.engine.requests import Request, Text, fail, reply
from workers.engine.settings import EngineSettings
from workers.engine.trunk_cache import TrunkCache
from workers.models.loading import LoadedModel
from workers.models.predictions import predicted_labels
from workers.models.prepack import rounded
from workers.models.steered import SteeredModel, Trunk
from workers.models.texts import TextOrPair
from workers.models.tokens import Encoded, TokenBatch

logger = logging.getLogger(__name__)


REASONS: Mapping[type[EngineError], str] = {
    QueueFull: "queue_full",
    RequestTooLarge: "too_large",
    Draining: "draining",
    DeadlineExceeded: "deadline",
    EngineFailed: "failed",
}
"""What the metrics call each way of not answering; a caller that hangs up is "cancelled"."""

TOKENIZED_AT_ONCE = 64
"""Requests whose texts are tokenized together; more wait for their turn."""


class Engine:
    """Answers texts with a model under the erasures of a mirror's snapshot.

    Args:
        model: the classifier.
        mirror: live erasures and active range set, started by the caller.
        registry: where its metrics go.
    """

    def __init__(
        self, model: LoadedModel, mirror: Mirror, settings: EngineSettings, registry: CollectorRegistry
    ) -> None:
        self.model = model
        self.settings = settings
        self.metrics = EngineMetrics(registry, settings)
        self._planner = Planner(mirror, model.device, settings.plan_cache_bytes)
        self._queue: BatchQueue[Text] = BatchQueue(settings)
        self._changed = threading.Condition()
        self._inbox: SimpleQueue[Request | Errand[Any] | None] = SimpleQueue()
        self._tokenizer = threading.Thread(target=self._read_inbox, name="tokenizer", daemon=True)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._errands: deque[Errand[Any]] = deque()
        self.looking = Looking(model, settings.max_batch_tokens, self._inbox.put, self._put_errand, self._takes_nothing)
        self._draining = False
        self._closing = False
        self._failure: str | None = None
        self._warm = threading.Event()
        self._tokens_per_second = 0.0
        self._untokenized = 0
        self._stale = False
        self._running = 0
        self._busy_seconds = 0.0
        self._watch = random.Random(0)
        self._cache: TrunkCache | None = None
        steered = model.steered
        self._packs = isinstance(steered, SteeredModel) and steered.splits and steered.packs
        if settings.trunk_cache_bytes and isinstance(steered, SteeredModel) and steered.splits:
            self._cache = TrunkCache(steered, model.tokens, settings.trunk_cache_bytes)

    @property
    def failure(self) -> str | None:
        """Why a thread of the engine died, in one line; None while it lives. Nothing can be answered any more."""
        return self._failure

    @property
    def ready(self) -> bool:
        """The model is warm, its thread lives, and new requests are taken."""
        return self._warm.is_set() and self._thread.is_alive() and not self._draining

    @property
    def draining(self) -> bool:
        """No new requests are taken any more."""
        return self._draining

    def start(self) -> None:
        """Start the model's thread and wait until a first batch went through.

        Raises:
            EngineFailed: the warm-up failed.
        """
        self._tokenizer.start()
        self._thread.start()
        while not self._warm.wait(0.05):
            if not self._thread.is_alive():
                raise EngineFailed("the model failed on its first batch; see the log")

    def drain(self) -> None:
        """Take no new requests; those accepted are still answered."""
        self._draining = True

    def close(self) -> None:
        """Drain, answer what was accepted, and stop the threads."""
        self.drain()
        if self._tokenizer.is_alive():
            self._inbox.put(None)
            self._tokenizer.join()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    async def classify(
        self,
        texts: Sequence[TextOrPair],
        erase: Sequence[Erasure] | None,
        *,
        compare: bool = False,
        truncate: bool = True,
        timeout: float | None = None,
        min_generation: str | None = None,
    ) -> Answer:
        """Classify texts or pairs under the erasures of the request, or under the live ones where `erase` is None.

        Args:
            compare: also give the bare model's logits.
            truncate: cut texts that are too long; else they are an error.
            timeout: seconds until the request is given up.
            min_generation: of the live state, or a later one of its epoch; it is waited for a little.

        Raises:
            GenerationNotReached: it is not.
            QueueFull, RequestTooLarge, Draining, DeadlineExceeded, EngineFailed: see `workers.engine.errors`.
            TextTooLong, EmptyText, UnknownToken, PairUnsupported: see `workers.models.errors`.
            RangeStoreError: the erasures cannot be resolved, or no range set or snapshot is at hand.
        """
        request: Request | None = None
        try:
            async with asyncio.timeout(timeout):
                request = await self._admit(texts, erase, compare, truncate, min_generation, timeout)
                if texts:
                    self._inbox.put(request)
                    if self._failure is not None:  # nobody may read it any more
                        raise EngineFailed("the engine stopped")
                    await request.done
        except TimeoutError:
            self.metrics.rejections.labels(REASONS[DeadlineExceeded]).inc()
            self.metrics.cancellations.labels(request.stage if request else "tokenizing").inc()
            raise DeadlineExceeded(timeout or 0.0) from None
        except asyncio.CancelledError:
            self.metrics.rejections.labels("cancelled").inc()
            self.metrics.cancellations.labels(request.stage if request else "tokenizing").inc()
            raise
        except EngineError as error:
            self.metrics.rejections.labels(REASONS[type(error)]).inc()
            raise
        finally:
            if request is not None:
                request.abandoned = True
                self._stale = self._stale or request.missing > 0
        admission = request.admission
        began = time.monotonic() if request.began is None else request.began
        answers = tuple(answer for answer in request.answers if answer is not None)
        self.metrics.texts.labels(admission.source).inc(len(answers))
        return Answer(
            answers,
            admission.source,
            admission.plan.plan.erasures,
            admission.enforced,
            admission.range_set,
            admission.generation,
            began - request.received,
            time.monotonic() - began,
        )

    def _takes_nothing(self) -> EngineError | None:
        if self._failure is not None:
            return EngineFailed("the engine stopped")
        return Draining() if self._draining else None

    def _put_errand(self, errand: Errand[Any]) -> None:
        """For the model's thread, between batches."""
        with self._changed:
            if self._closing:
                raise self._takes_nothing() or Draining()
            self._errands.append(errand)
            self._changed.notify()

    async def _admit(
        self,
        texts: Sequence[TextOrPair],
        erase: Sequence[Erasure] | None,
        compare: bool,
        truncate: bool,
        min_generation: str | None,
        timeout: float | None,
    ) -> Request:
        """Freeze the plan, or refuse the request before any work is done for it."""
        if self._draining:
            raise Draining
        self._check_room(len(texts), 0)
        admission = await self._planner.admit(erase, min_generation, timeout)
        loop = asyncio.get_running_loop()
        nothing: list[TextAnswer | None] = [None] * len(texts)
        with self._changed:
            self._untokenized += len(texts)
        return Request(loop, loop.create_future(), texts, admission, compare, truncate, nothing, len(texts))

    def _read_inbox(self) -> None:
        """The tokenizer's thread: whatever has come in, at once, until the engine closes. If it dies, all end."""
        requests: list[Request] = []
        try:
            while requests := self._next_requests():
                wanted: dict[bool, list[Request]] = {True: [], False: []}
                for request in requests:
                    if request.abandoned:
                        self._left_tokenizer(request)
                    else:
                        wanted[request.truncate].append(request)
                for truncate, some in wanted.items():
                    if some:
                        self._tokenize(some, truncate)
        except BaseException as error:
            self._die("tokenizer", error, requests)
            raise

    def _next_requests(self) -> list[Request]:
        """Waits for requests; none when the engine closes."""
        requests: list[Request] = []
        while len(requests) < TOKENIZED_AT_ONCE:
            try:  # another thread that dies may empty the inbox meanwhile: what is at hand must not wait for more
                request = self._inbox.get(block=not requests)
            except Empty:
                break
            if request is None:
                if requests:
                    self._inbox.put(None)  # close, but after these
                break
            if isinstance(request, Errand):
                request.run()
                continue
            requests.append(request)
        return requests

    def _left_tokenizer(self, request: Request) -> None:
        """The texts of a request count as queued now, or no more."""
        with self._changed:
            self._untokenized -= len(request.texts)

    def _tokenize(self, requests: list[Request], truncate: bool) -> None:
        """Tokenize and queue the texts of several requests; one that cannot be tokenized or queued fails alone."""
        texts = [text for request in requests for text in request.texts]
        try:
            encoded = iter(self.model.tokens.encode(texts, truncate))
        except Exception as error:
            if len(requests) == 1:
                self._left_tokenizer(requests[0])
                fail([(requests[0], error)])
            else:
                for request in requests:
                    self._tokenize([request], truncate)
            return
        for request in requests:
            self.metrics.stage.labels("tokenize").observe(time.monotonic() - request.received)
            self._left_tokenizer(request)
            try:
                self._enqueue(self._texts(request, encoded))
            except EngineError as error:
                fail([(request, error)])

    def _texts(self, request: Request, encoded: Iterator[Encoded]) -> list[Text]:
        """The texts of a request, as they are queued; takes their token ids off `encoded`."""
        plan = request.admission.plan.plan
        last = self.model.identity.n_layers - 1
        # a text without erasure needs no split: it joins the batches of the last block, where a bare answer is free
        at = last if plan.split is None else plan.split
        if plan.site != "block_output":
            at = WHOLE_PASS
        variants = 1
        if at != last:
            variants += (request.compare and bool(plan.masks)) + (request.admission.guard is not None)
        packed = self._packs and at == last
        return [Text(request, i, next(encoded), at, variants, packed) for i in range(len(request.texts))]

    def _enqueue(self, texts: list[Text]) -> None:
        """Queue all texts of a request, or none."""
        tokens = sum(text.tokens * text.variants for text in texts)
        if tokens > self.settings.max_queue_tokens:
            raise RequestTooLarge("tokens", tokens, self.settings.max_queue_tokens)
        with self._changed:
            if self._closing:
                raise Draining
            self._check_room(len(texts), tokens)
            for text in texts:
                self._queue.add(text)
            texts[0].request.stage = "queued"
            self._gauge()
            self._changed.notify()

    def refusal(self, *, counted: bool = True) -> QueueFull | None:
        """Why not even one text would be taken now, and then a refused request is `counted`; None if it would.

        Under overload most requests end here, before anybody has read them: what they cost, the accepted ones lack.
        While draining none does: whose connection is to be closed must have been heard, or its reply may be lost.
        """
        if self._draining:
            return None
        try:
            self._check_room(1, 0)
        except QueueFull as full:
            if counted:
                self.metrics.rejections.labels(REASONS[QueueFull]).inc()
            return full
        return None

    @property
    def load(self) -> Load:
        """What is before it now."""
        full = self.refusal(counted=False)
        retry_after = full.retry_after if full is not None else None
        return Load(self._queue.tokens + self._running, retry_after, self._busy_seconds)

    def _check_room(self, texts: int, tokens: int) -> None:
        """Raises what a request of so many texts and tokens is to be refused with."""
        if texts > self.settings.max_queue_texts:
            raise RequestTooLarge("texts", texts, self.settings.max_queue_texts)
        with self._changed:
            if self._stale and self._missing_room(texts, tokens) > 0:
                self._stale = False
                self._queue.discard(lambda text: text.abandoned)
                self._gauge()
            missing = self._missing_room(texts, tokens)
        if missing > 0:
            raise QueueFull(max(1.0, math.ceil(missing / self._tokens_per_second)) if self._tokens_per_second else 1.0)

    def _missing_room(self, texts: int, tokens: int) -> float:
        """Tokens that must leave the queue before so many texts and tokens may enter; 0 if they may now."""
        waiting, texts_waiting = self._queue.tokens, len(self._queue)
        each = waiting / texts_waiting if texts_waiting else 1.0
        too_many = texts_waiting + self._untokenized + texts - self.settings.max_queue_texts
        missing = max(0.0, waiting + tokens - self.settings.max_queue_tokens, too_many * each)
        if self._tokens_per_second:
            missing = max(missing, waiting - self.settings.max_queue_seconds * self._tokens_per_second)
        return missing

    def _gauge(self) -> None:
        self.metrics.queue_texts.set(len(self._queue))
        self.metrics.queue_tokens.set(self._queue.tokens)

    def _run(self) -> None:
        """The model's thread: batch after batch until the engine closes. If it dies, whoever waits is told."""
        batch: list[Text] = []
        try:
            self._warm_up()
            self._warm.set()
            while True:
                with self._changed:
                    while not len(self._queue) and not self._errands and not self._closing:
                        self._changed.wait()
                    errand = self._errands.popleft() if self._errands else None
                    batch = self._queue.take()
                    backlog = len(self._queue) > 0
                    self._gauge()
                    if not batch and errand is None and self._closing:
                        return
                if errand is not None and not errand.run():
                    self._warm_up()  # a device that fails on any text ends the engine
                if batch:
                    started = time.monotonic()
                    self._running = sum(text.tokens * text.variants for text in batch)
                    self._answer(batch)
                    self._running = 0
                    self._busy_seconds += time.monotonic() - started
                    if backlog:
                        self._measure_rate(batch, time.monotonic() - started)
        except BaseException as error:
            self._die("engine", error, [text.request for text in batch])
            raise

    def _die(self, what: str, error: BaseException, requests: list[Request]) -> None:
        """A thread ends by an error: nothing more is answered, and whoever waits is told."""
        logger.error("the %s's thread died", what, exc_info=error)
        self.drain()
        reason = (str(error).strip().splitlines() or [""])[0]
        self._failure = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        with self._changed:
            self._closing = True
            lost = requests + [text.request for text in self._queue.discard(lambda text: True)]
            self._changed.notify_all()
        closing = False
        with suppress(Empty):
            while True:  # the tokenizer's thread may take some of it at the same time
                request = self._inbox.get_nowait()
                if isinstance(request, Errand):
                    self._errands.append(request)
                elif request is not None:
                    lost.append(request)
                else:
                    closing = True
        if closing:
            self._inbox.put(None)
        while self._errands:
            self._errands.popleft().fail(EngineFailed("the engine stopped"))
        fail((request, EngineFailed("the engine stopped")) for request in lost)

    def _measure_rate(self, batch: list[Text], seconds: float) -> None:
        """How fast a backlog drains; a batch that left none behind may have been small, and tells nothing."""
        rate = sum(text.tokens * text.variants for text in batch) / max(seconds, 1e-6)
        self._tokens_per_second = rate if not self._tokens_per_second else 0.9 * self._tokens_per_second + 0.1 * rate

    def _warm_up(self) -> None:
        """A first, or a further, small batch; raises whatever the model does."""
        warm = self.model.tokens.encode(["warm-up"])
        self.model.steered.logits(self.model.tokens.pad([warm[0].ids], self.model.device))

    def _answer(self, batch: list[Text]) -> None:
        """Run a batch and reply. If it raises, halves are tried, so that only the text that causes it fails."""
        started = time.monotonic()
        for text in batch:
            text.request.stage = "running"
            if text.request.began is None:
                text.request.began = started
            self.metrics.queue_wait.observe(started - text.admitted)
        try:
            answers = self._forward(batch)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            if len(batch) > 1:
                middle = len(batch) // 2
                self._answer(batch[:middle])
                self._answer(batch[middle:])
                return
            failed = batch[0].request
            said = "a text of %d tokens failed: %s"
            failed.context.run(logger.error, said, batch[0].tokens, type(error).__name__, exc_info=error)
            fail([(failed, EngineFailed("the model failed on this text"))])
            self._warm_up()  # a text that fails is one thing; a device that fails on any text ends the engine
            return
        done = time.monotonic()
        self._observe(batch, answers, done - started)
        replied = self.metrics.stage.labels("reply")
        reply(list(zip(batch, answers, strict=True)), lambda: replied.observe(time.monotonic() - done))

    def _forward(self, batch: list[Text]) -> list[TextAnswer]:
        model = self.model
        tokens = model.tokens.batch([text.encoded for text in batch], model.device)
        variants = [Variant(row, text.plan) for row, text in enumerate(batch) if text.plan_key]
        watched = bool(variants) and self._watch.random() < self.settings.watched_batches
        bare = watched or any(text.compare or not text.plan_key for text in batch)
        with self._timed("trunk"):
            trunk = self._trunk(batch, tokens, whole=bare)
        base: Logits | None = None if trunk.logits is None else trunk.logits.float().cpu().numpy()
        if variants:
            with self._timed("tail"):
                outcome = steer_variants(model.steered, tokens, trunk, variants, self.settings.max_batch_tokens)
                erased = outcome.logits.float().cpu().numpy()
                masked = outcome.masked.tolist()
            self.metrics.count(self.metrics.masked, outcome.by_concept)
            self.metrics.count(self.metrics.maskable, outcome.of)
            self._enforce([text for text in batch if text.plan_key], erased, variants, tokens, trunk)
        answers = []
        nth = 0
        for row, text in enumerate(batch):
            baseline = base[row] if base is not None and text.compare else None
            if text.plan_key:
                logits, count = erased[nth], masked[nth]
                nth += 1
            else:
                assert base is not None
                logits, count = base[row], 0
            answers.append(TextAnswer(logits, baseline, count, text.encoded.truncated, text.tokens))
        if base is not None and variants:
            self._count_changes(batch, base, answers, watched)
        return answers

    def _enforce(
        self, texts: list[Text], erased: Logits, variants: list[Variant], tokens: TokenBatch, trunk: Trunk
    ) -> None:
        """Lower in `erased` [V, K], in place, what the enforced erasures of a text alone would leave lower."""
        guarded = [
            (n, Variant(variant.row, text.guard))
            for n, (text, variant) in enumerate(zip(texts, variants, strict=True))
            if text.guard is not None
        ]
        if not guarded:
            return
        guards = [variant for _, variant in guarded]
        outcome = steer_variants(self.model.steered, tokens, trunk, guards, self.settings.max_batch_tokens)
        names = self.model.identity.labels
        for (n, _), alone in zip(guarded, outcome.logits.float().cpu().numpy(), strict=True):
            enforced = texts[n].request.admission.enforced
            labels = [index for index, name in enumerate(names) if name in enforced]
            erased[n] = capped(erased[n], alone, labels)

    def _trunk(self, batch: list[Text], tokens: TokenBatch, *, whole: bool) -> Trunk:
        split = batch[0].split
        if self._cache is None or split == WHOLE_PASS:
            return open_trunk(self.model.steered, tokens, split, whole=whole)
        hits, misses = self._cache.hits, self._cache.misses
        trunk = self._cache.trunk(tokens, [text.encoded for text in batch], split, whole=whole)
        self.metrics.trunk_cache_hits.inc(self._cache.hits - hits)
        self.metrics.trunk_cache_misses.inc(self._cache.misses - misses)
        self.metrics.trunk_cache_bytes.set(self._cache.nbytes)
        return trunk

    def _count_changes(self, batch: list[Text], base: Logits, answers: list[TextAnswer], watched: bool) -> None:
        """Count, by erased concept, the texts whose label differs from the bare model's."""
        head = self.model.head
        seen, changed = Counter[str](), Counter[str]()
        for row, (text, answer) in enumerate(zip(batch, answers, strict=True)):
            if watched or text.compare:
                concepts = [erasure.concept for erasure in text.plan.plan.erasures]
                seen.update(concepts)
                if predicted_labels(answer.logits, head) != predicted_labels(base[row], head):
                    changed.update(concepts)
        self.metrics.count(self.metrics.watched, seen)
        self.metrics.count(self.metrics.changed, {concept: changed[concept] for concept in seen})  # zeros too: a ratio

    def _observe(self, batch: list[Text], answers: list[TextAnswer], seconds: float) -> None:
        tokens = sum(text.tokens for text in batch)
        self.metrics.forward.observe(seconds)
        self.metrics.batch_texts.observe(len(batch))
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_plans.observe(len({text.plan_key for text in batch} - {""}))
        self.metrics.tokens.inc(tokens)
        self.metrics.padded_tokens.inc(
            rounded(tokens) if self._packs else max(text.tokens for text in batch) * len(batch)
        )
        self.metrics.masked_neurons.inc(sum(answer.masked_neurons for answer in answers))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.metrics.stage.labels(stage).observe(time.monotonic() - started)
