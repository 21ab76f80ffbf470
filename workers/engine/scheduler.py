"""What waits for the model, how much may wait, and which batch runs next."""

import math
import threading
from collections import deque
from typing import Any

from workers.engine.answers import Load
from workers.engine.errors import Draining, QueueFull, RequestTooLarge
from workers.engine.metrics import EngineMetrics
from workers.engine.queue import BatchQueue
from workers.engine.requests import Request, Task, Text
from workers.engine.settings import EngineSettings


class Scheduler:
    """The texts and tasks between event loops, the tokenizer's thread and the model's. Thread-safe."""

    def __init__(self, settings: EngineSettings, metrics: EngineMetrics) -> None:
        self.queue: BatchQueue[Text] = BatchQueue(settings)
        self.untokenized = 0
        """Texts that were admitted and are not in the queue yet."""
        self.running = 0
        """Tokens of the batch that runs now."""
        self.tokens_per_second = 0.0
        """How fast a backlog drains; 0 until there was one."""
        self._settings, self._metrics = settings, metrics
        self._changed = threading.Condition()
        self._tasks: deque[Task[Any]] = deque()
        self._closing = False
        self._stale = False
        self._busy_seconds = 0.0

    def load(self) -> Load:
        """How much there is to do."""
        full = self.refusal()
        tokens = self.queue.tokens + self.running
        return Load(tokens, full.retry_after if full is not None else None, self._busy_seconds)

    def refusal(self) -> QueueFull | None:
        """Why not even one text has room now; None if it has."""
        try:
            self.check_room(1)
        except QueueFull as full:
            return full
        return None

    def check_room(self, texts: int, tokens: int = 0) -> None:
        """Check that a request has room.

        Raises:
            RequestTooLarge, QueueFull: it has not.
        """
        if texts > self._settings.max_queue_texts:
            raise RequestTooLarge("texts", texts, self._settings.max_queue_texts)
        with self._changed:
            if self._stale and self._missing_room(texts, tokens) > 0:
                self._stale = False
                self.queue.discard(lambda text: text.abandoned)
                self._update_gauges()
            missing = self._missing_room(texts, tokens)
        if missing > 0:
            raise QueueFull(max(1.0, math.ceil(missing / self.tokens_per_second)) if self.tokens_per_second else 1.0)

    def _missing_room(self, texts: int, tokens: int) -> float:
        """Tokens that must leave the queue before this many texts and tokens may enter; 0 if they may now."""
        waiting, texts_waiting = self.queue.tokens, len(self.queue)
        each = waiting / texts_waiting if texts_waiting else 1.0
        too_many = texts_waiting + self.untokenized + texts - self._settings.max_queue_texts
        missing = max(0.0, waiting + tokens - self._settings.max_queue_tokens, too_many * each)
        if self.tokens_per_second:
            missing = max(missing, waiting - self._settings.max_queue_seconds * self.tokens_per_second)
        return missing

    def admitted(self, texts: int) -> None:
        """Count texts that are about to be tokenized."""
        with self._changed:
            self.untokenized += texts

    def left_tokenizer(self, request: Request) -> None:
        """The texts of a request are about to be queued, or will never be."""
        with self._changed:
            self.untokenized -= len(request.texts)

    def abandoned(self) -> None:
        """The queue may hold texts that nobody waits for; they are dropped when room is short."""
        self._stale = True

    def add(self, texts: list[Text]) -> None:
        """Queue all texts of a request, or none.

        Raises:
            RequestTooLarge, QueueFull, Draining: none.
        """
        tokens = sum(text.cost for text in texts)
        if tokens > self._settings.max_queue_tokens:
            raise RequestTooLarge("tokens", tokens, self._settings.max_queue_tokens)
        with self._changed:
            if self._closing:
                raise Draining
            self.check_room(len(texts), tokens)
            for text in texts:
                self.queue.add(text)
            texts[0].request.stage = "queued"
            self._update_gauges()
            self._changed.notify()

    def add_task(self, task: Task[Any]) -> bool:
        """Queue a task for the model's thread; returns False if no more are taken."""
        with self._changed:
            if self._closing:
                return False
            self._tasks.append(task)
            self._changed.notify()
        return True

    def next_work(self) -> tuple[list[Text], Task[Any] | None, bool] | None:
        """Wait for a batch, a task or both; None when closed and nothing is left.

        The third part says whether the batch leaves a backlog.
        """
        with self._changed:
            while not len(self.queue) and not self._tasks and not self._closing:
                self._changed.wait()
            task = self._tasks.popleft() if self._tasks else None
            batch = self.queue.take()
            self._update_gauges()
            if not batch and task is None and self._closing:
                return None
            return batch, task, len(self.queue) > 0

    def ran(self, batch: list[Text], seconds: float, backlog: bool) -> None:
        """Note how long a batch took. One that left no backlog may have been small, so it gives no rate."""
        self._busy_seconds += seconds
        if backlog:
            rate = sum(text.cost for text in batch) / max(seconds, 1e-6)
            self.tokens_per_second = rate if not self.tokens_per_second else 0.9 * self.tokens_per_second + 0.1 * rate

    def close(self) -> None:
        """Take nothing new; the model's thread ends when nothing is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def abort(self) -> tuple[list[Request], list[Task[Any]]]:
        """Close, and give up what waits."""
        with self._changed:
            self._closing = True
            requests = [text.request for text in self.queue.discard(lambda text: True)]
            tasks = list(self._tasks)
            self._tasks.clear()
            self._changed.notify_all()
        return requests, tasks

    def _update_gauges(self) -> None:
        self._metrics.queue_texts.set(len(self.queue))
        self._metrics.queue_tokens.set(self.queue.tokens)
