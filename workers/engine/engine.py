"""The engine: admits requests, freezes their plans, batches their texts, and answers.

Three kinds of thread: the event loop admits and replies, one thread tokenizes, one runs the model. Nothing on the
event loop waits for torch, and a batch wakes it once, not once per text.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from prometheus_client import CollectorRegistry

from range_store.domain.erasure import Erasure
from range_store.storage.mirror import Mirror
from workers.engine.admission import Planner
from workers.engine.answers import Answer, Load
from workers.engine.errors import DeadlineExceeded, Draining, EngineError, EngineFailed, QueueFull
from workers.engine.inspector import Inspector
from workers.engine.metrics import EngineMetrics
from workers.engine.requests import Request, Task, Text, fail
from workers.engine.runner import BatchRunner
from workers.engine.scheduler import Scheduler
from workers.engine.settings import EngineSettings
from workers.models.loading import LoadedModel
from workers.models.texts import TextOrPair
from workers.models.tokens import Encoded

logger = logging.getLogger(__name__)

TOKENIZED_AT_ONCE = 64
"""Most requests whose texts are tokenized together."""


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
        self._planner = Planner(mirror, settings.plan_cache_bytes)
        self._scheduler = Scheduler(settings, self.metrics)
        self._runner = BatchRunner(model, settings, self.metrics)
        self._inbox: SimpleQueue[Request | Task[Any] | None] = SimpleQueue()
        self._tokenizer = threading.Thread(target=self._run_tokenizer, name="tokenizer", daemon=True)
        self._thread = threading.Thread(target=self._run_model, name="engine", daemon=True)
        self.inspector = Inspector(model, settings.max_batch_tokens, self._inbox.put, self._add_task, self._unavailable)
        self._draining = False
        self._failure: str | None = None
        self._warm = threading.Event()

    @property
    def failure(self) -> str | None:
        """Why a thread of the engine died, in one line; None while they live. Nothing can be answered any more."""
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
        """Start the threads and wait until a first batch went through the model.

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
        self._scheduler.close()
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
            min_generation: of the live state; a later one of its epoch will do. The request waits for it a little.

        Raises:
            GenerationNotReached: the live state did not reach `min_generation` in time.
            QueueFull, RequestTooLarge, Draining, DeadlineExceeded, EngineFailed: see `workers.engine.errors`.
            TextTooLong, EmptyText, UnknownToken, PairUnsupported: see `workers.models.errors`.
            RangeStoreError: the erasures cannot be resolved, or no range set or snapshot is at hand.
        """
        request: Request | None = None
        try:
            async with asyncio.timeout(timeout):
                if self._draining:
                    raise Draining
                self._scheduler.check_room(len(texts))
                admission = await self._planner.admit(erase, min_generation, timeout)
                request = Request(texts, admission, compare, truncate)
                self._scheduler.admitted(len(texts))
                if texts:
                    self._inbox.put(request)
                    if self._failure is not None:  # the inbox may have been emptied before
                        raise self._stopped()
                    await request.done
        except TimeoutError:
            self._count_rejection(DeadlineExceeded.reason, request)
            raise DeadlineExceeded(timeout or 0.0) from None
        except asyncio.CancelledError:
            self._count_rejection("cancelled", request)
            raise
        except EngineError as error:
            self.metrics.rejections.labels(error.reason).inc()
            raise
        finally:
            if request is not None:
                request.abandoned = True
                if request.missing:
                    self._scheduler.abandoned()
        began = time.monotonic() if request.began is None else request.began
        answers = tuple(answer for answer in request.answers if answer is not None)
        self.metrics.texts.labels(admission.source).inc(len(answers))
        return Answer(
            texts=answers,
            source=admission.source,
            erasures=admission.plan.erasures,
            enforced=admission.enforced,
            range_set=admission.range_set,
            generation=admission.generation,
            queued_seconds=began - request.received,
            running_seconds=time.monotonic() - began,
        )

    def _count_rejection(self, reason: str, request: Request | None) -> None:
        """Count a request that its caller gave up."""
        self.metrics.rejections.labels(reason).inc()
        self.metrics.cancellations.labels(request.stage if request else "tokenizing").inc()

    def refusal(self, *, counted: bool = True) -> QueueFull | None:
        """Why not even one text would be taken now, and then a refused request is `counted`; None if it would.

        Under overload most requests end here, before their bodies are read, so that they take little from those that
        are accepted. While draining none does: its connection is about to be closed, and a reply to a request that was
        not read could be lost.
        """
        full = None if self._draining else self._scheduler.refusal()
        if full is not None and counted:
            self.metrics.rejections.labels(full.reason).inc()
        return full

    @property
    def load(self) -> Load:
        """How much there is to do now."""
        load = self._scheduler.load()
        return Load(load.tokens, None, load.busy_seconds) if self._draining else load

    def _unavailable(self) -> EngineError | None:
        """Why no new task is taken; None if one is."""
        if self._failure is not None:
            return self._stopped()
        return Draining() if self._draining else None

    def _add_task(self, task: Task[Any]) -> None:
        if not self._scheduler.add_task(task):
            raise self._unavailable() or Draining()

    @staticmethod
    def _stopped() -> EngineFailed:
        return EngineFailed("the engine stopped")

    def _run_tokenizer(self) -> None:
        """The tokenizer's thread: takes everything that has come in, until the engine closes."""
        requests: list[Request] = []
        try:
            while requests := self._next_requests():
                groups: dict[bool, list[Request]] = {True: [], False: []}
                for request in requests:
                    if request.abandoned:
                        self._scheduler.left_tokenizer(request)
                    else:
                        groups[request.truncate].append(request)
                for truncate, some in groups.items():
                    if some:
                        self._tokenize(some, truncate)
        except BaseException as error:
            self._die("tokenizer", error, requests)
            raise

    def _next_requests(self) -> list[Request]:
        """Wait for requests; none when the engine closes."""
        requests: list[Request] = []
        while len(requests) < TOKENIZED_AT_ONCE:
            try:  # another thread that dies may empty the inbox meanwhile: requests at hand must not wait for more
                request = self._inbox.get(block=not requests)
            except Empty:
                break
            if request is None:
                if requests:
                    self._inbox.put(None)  # close, but after these
                break
            if isinstance(request, Task):
                request.run()
                continue
            requests.append(request)
        return requests

    def _tokenize(self, requests: list[Request], truncate: bool) -> None:
        """Tokenize and queue the texts of several requests; one that cannot be tokenized or queued fails alone."""
        texts = [text for request in requests for text in request.texts]
        try:
            encoded = iter(self.model.tokens.encode(texts, truncate))
        except Exception as error:
            if len(requests) == 1:
                self._scheduler.left_tokenizer(requests[0])
                fail([(requests[0], error)])
            else:
                for request in requests:
                    self._tokenize([request], truncate)
            return
        for request in requests:
            self.metrics.stage.labels("tokenize").observe(time.monotonic() - request.received)
            self._scheduler.left_tokenizer(request)
            try:
                self._scheduler.add(self._texts(request, encoded))
            except EngineError as error:
                fail([(request, error)])

    def _texts(self, request: Request, encoded: Iterator[Encoded]) -> list[Text]:
        """The texts of a request as they are queued; takes their token ids from `encoded`."""
        plan, steered = request.admission.plan, self.model.steered
        split = steered.split_for(plan.edits, plan.site)
        at_last = split == steered.n_layers - 1
        variants = 1
        if not at_last:  # above the last block a variant costs next to nothing
            variants += (request.compare and bool(plan.edits)) + (request.admission.guard is not None)
        packed = steered.packs and at_last
        return [Text(request, i, next(encoded), split, variants, packed) for i in range(len(request.texts))]

    def _run_model(self) -> None:
        """The model's thread: batch after batch, until the engine closes."""
        batch: list[Text] = []
        try:
            self._runner.warm_up()
            self._warm.set()
            while (work := self._scheduler.next_work()) is not None:
                batch, task, backlog = work
                if task is not None and not task.run():
                    self._runner.warm_up()  # a device that fails on any text ends the engine
                if batch:
                    started = time.monotonic()
                    self._scheduler.running = sum(text.cost for text in batch)
                    self._runner.answer(batch)
                    self._scheduler.running = 0
                    self._scheduler.ran(batch, time.monotonic() - started, backlog)
        except BaseException as error:
            self._die("engine", error, [text.request for text in batch])
            raise

    def _die(self, thread: str, error: BaseException, requests: list[Request]) -> None:
        """A thread ended with an error: nothing more is answered, and everything that waits fails."""
        logger.error("the %s's thread died", thread, exc_info=error)
        self.drain()
        reason = (str(error).strip().splitlines() or [""])[0]
        self._failure = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        lost, tasks = self._scheduler.abort()
        closing = False
        with suppress(Empty):
            while True:  # the tokenizer's thread may take some of it at the same time
                waiting = self._inbox.get_nowait()
                if isinstance(waiting, Task):
                    tasks.append(waiting)
                elif waiting is not None:
                    lost.append(waiting)
                else:
                    closing = True
        if closing:
            self._inbox.put(None)
        for task in tasks:
            task.fail(self._stopped())
        fail((request, self._stopped()) for request in [*requests, *lost])
