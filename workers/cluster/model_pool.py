"""A pool of models on the nodes of a Ray cluster, which applies functions to tasks.

Ray places the actors. Its pool (`ray.util.ActorPool`) submits all tasks at once and gives up when an actor dies; its
task retries wait for the same actor, for which a cluster that lost a node may have no room; and calls to an actor that
it restarts use up their retries within seconds, or never end where a model kills its process for lack of memory. So
here few tasks are taken ahead, a task whose actor dies goes to another one, and new actors replace those that died.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from range_store.domain.range_set import ModelIdentity
from range_store.errors import RangeStoreError
from workers.cluster.connection import WARN_SECONDS, free_resources
from workers.cluster.errors import ClusterError, first_line
from workers.corpora.errors import CorpusError
from workers.models.errors import ModelError
from workers.models.loading import LoadedModel, load_model, use_threads
from workers.models.predictions import Head

logger = logging.getLogger(__name__)

PER_ACTOR = 2
"""Tasks that an actor has at once, so that it need not wait for the next one."""
ATTEMPTS = 4
"""How many actors may die with the same task, or, for each actor of the pool, in a row before any work is done."""
WAIT_SECONDS = 0.5
"""Longest wait between two checks of the pool."""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PoolLayout:
    """The number of actors, the CPU threads of each, and whether each has a GPU of its own."""

    actors: int
    threads: int
    gpu: bool

    @classmethod
    def of(cls, actors: int | None, threads: int | None, device: str) -> "PoolLayout":
        """The layout for the connected cluster, as far as it is not given.

        Args:
            actors: None: one for each GPU, or without GPUs one for each node.
            threads: of each; None: an equal share of its node's CPUs.
            device: "auto" takes GPUs if the cluster has any.

        Raises:
            ClusterError: no node fits, and `actors` or `threads` is not given. If both are, the pool waits for nodes.
        """
        if device.startswith("cuda:"):
            raise ClusterError(f"with --ray the cluster chooses the GPU: use --device cuda instead of {device}")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        gpu = device == "cuda" or (device == "auto" and bool(with_gpu))
        hosts = with_gpu if gpu else [node for node in nodes if node.get("CPU", 0) >= 1]
        if not hosts and actors and threads:
            return cls(actors, threads, gpu)
        if not hosts:
            missing = "a GPU: use --device cpu" if gpu else "a CPU"
            raise ClusterError(f"no node of the cluster has {missing}; to wait for nodes, pass --actors and --threads")
        count = actors or (sum(int(node["GPU"]) for node in hosts) if gpu else len(hosts))
        share = int(min(node.get("CPU", 1) for node in hosts)) // math.ceil(count / len(hosts))
        return cls(count, threads or max(1, share), gpu)

    def __str__(self) -> str:
        return f"{self.actors} × {self.threads} CPUs" + (" and a GPU" if self.gpu else "")


@dataclass(frozen=True)
class ModelInfo:
    """The model that an actor loaded, and the process that it runs in."""

    identity: ModelIdentity
    earlier_fingerprint: str | None
    dtype: str
    template: str | None
    head: Head
    threads: int
    node: str
    pid: int
    hardware: str
    versions: Mapping[str, str]


class ModelActor:
    """A model on some node. `ModelPool` makes a Ray actor of this class."""

    def __init__(self, source: str, choices: Mapping[str, Any], threads: int) -> None:
        self._source, self._choices, self._threads = source, choices, threads
        self._model: LoadedModel | None = None
        self._made: dict[str, Callable[[Any], Any]] = {}

    def load(self) -> ModelInfo:
        """Load the model. Not done by `__init__`, whose errors Ray turns into text. Raises ModelError."""
        use_threads(self._threads)
        model = self._model = load_model(self._source, **self._choices)
        gpu = model.device.type == "cuda"
        return ModelInfo(
            model.identity,
            model.earlier_fingerprint,
            model.dtype,
            model.template,
            model.head,
            torch.get_num_threads(),
            ray.util.get_node_ip_address(),
            os.getpid(),
            torch.cuda.get_device_name(model.device) if gpu else torch.backends.cpu.get_cpu_capability(),
            {name: version(name) for name in ("neuronlens", "torch", "transformers", "numpy")},
        )

    def run(self, key: str, make: Callable[[LoadedModel, Any], Callable[[Any], Any]], shared: Any, task: Any) -> Any:
        """The seconds that a task took, and its result: `make(model, shared)(task)`. It is made once for each key."""
        assert self._model is not None
        started = time.monotonic()
        if key not in self._made:
            self._made = {key: make(self._model, shared)}
        result = self._made[key](task)
        return time.monotonic() - started, result


@dataclass(frozen=True, eq=False)
class ActorFunction(Generic[Task, Result]):
    """A function that actors apply to tasks: `make(model, shared)` makes it. `shared` is sent to each node once."""

    make: Callable[[LoadedModel, Any], Callable[[Task], Result]]
    shared: Any  # a reference to it
    key: str

    @classmethod
    def of(
        cls, make: Callable[[LoadedModel, Any], Callable[[Task], Result]], shared: Any
    ) -> "ActorFunction[Task, Result]":
        reference = ray.put(shared)
        return cls(make, reference, reference.hex())


@dataclass(eq=False)
class _Actor:
    """An actor: `loading` refers to its `ModelInfo` until it has loaded, `tasks` is the number that it has now."""

    handle: Any
    loading: Any
    info: ModelInfo | None = None
    tasks: int = 0


@dataclass(eq=False)
class _Call(Generic[Task]):
    """A task at an actor. Of the references to its seconds and its result, the second may be to a large object."""

    index: int
    task: Task
    attempts: int = 0
    actor: _Actor | None = None
    seconds: Any = None
    result: Any = None


class ModelPool:
    """Models on the nodes of the connected cluster.

    Args:
        source, choices: arguments of `load_model`.
    """

    def __init__(self, source: str, choices: Mapping[str, Any], layout: PoolLayout) -> None:
        self.layout = layout
        self._arguments = (source, dict(choices), layout.threads)
        self._actors: list[_Actor] = []
        self._deaths = 0
        self._info: ModelInfo | None = None
        self._unloaded_since: float | None = None

    def __enter__(self) -> "ModelPool":
        self._actors = [self._start() for _ in range(self.layout.actors)]
        return self

    def __exit__(self, *error: object) -> None:
        for actor in self._actors:
            with suppress(RayError):
                ray.kill(actor.handle)

    def _start(self) -> _Actor:
        resources = {"num_cpus": self.layout.threads, "num_gpus": int(self.layout.gpu)}
        handle = ray.remote(ModelActor).options(**resources, max_restarts=0).remote(*self._arguments)
        return _Actor(handle, handle.load.remote())

    @property
    def model_info(self) -> ModelInfo:
        """What the first actor loaded, and so all of them. Waits for it. Raises ModelError, ClusterError."""
        while self._info is None:
            self._wait({}, {})
        return self._info

    def map(self, function: ActorFunction[Task, Result], tasks: Iterator[Task]) -> Iterator[tuple[Task, Result, float]]:
        """Each task with its result and the seconds that it took, in the order of the tasks.

        Tasks are taken as actors come free, and only a bounded number ahead of the first one that is not done.

        Raises:
            ModelError, CorpusError, RangeStoreError: an actor raised it.
            ClusterError: an actor raised another error, or actors died with the task again and again.
        """
        yield from self._map(function, tasks, PER_ACTOR)

    def call(self, function: ActorFunction[Task, Result], task: Task) -> Result:
        """The result of one task, which is submitted at once, however many tasks actors have."""
        ((_, result, _),) = self._map(function, iter((task,)), math.inf)
        return result

    def _map(
        self, function: ActorFunction[Task, Result], tasks: Iterator[Task], per_actor: float
    ) -> Iterator[tuple[Task, Result, float]]:
        running: dict[Any, _Call[Task]] = {}
        try:
            yield from self._results(function, tasks, per_actor, running)
        finally:
            for call in running.values():  # nobody waits for these any more, and their actors are free for other tasks
                assert call.actor is not None
                call.actor.tasks -= 1

    def _results(
        self,
        function: ActorFunction[Task, Result],
        tasks: Iterator[Task],
        per_actor: float,
        running: dict[Any, _Call[Task]],
    ) -> Iterator[tuple[Task, Result, float]]:
        window = (PER_ACTOR + 1) * len(self._actors)
        waiting: dict[int, _Call[Task]] = {}
        done: dict[int, _Call[Task]] = {}
        taken = given = 0
        more = True
        while more or given < taken:
            while (actor := self._free(per_actor)) is not None:
                if more and not waiting and taken - given < window:
                    if (task := next(tasks, None)) is None:
                        more = False
                    else:
                        waiting[taken] = _Call(taken, task)
                        taken += 1
                if not waiting:
                    break
                call = waiting.pop(min(waiting))
                run = actor.handle.run.options(num_returns=2)
                call.seconds, call.result = run.remote(function.key, function.make, function.shared, call.task)
                call.actor = actor
                actor.tasks += 1
                running[call.seconds] = call
            while given in done:
                call = done.pop(given)
                try:
                    seconds, result = ray.get([call.seconds, call.result])
                except RayError as error:
                    waiting[given] = self._failed(call, error)
                    break
                call.result = None
                given += 1
                yield call.task, result, seconds
            if running or self._free(per_actor) is None:
                waiting |= self._wait(running, done)

    def _free(self, per_actor: float) -> _Actor | None:
        """The loaded actor with the fewest tasks, if it has fewer than `per_actor`."""
        free = [actor for actor in self._actors if actor.loading is None and actor.tasks < per_actor]
        return min(free, key=lambda actor: actor.tasks, default=None)

    def _wait(self, running: dict[Any, _Call[Task]], done: dict[int, _Call[Task]]) -> dict[int, _Call[Task]]:
        """Wait for a call or a model. Moves calls into `done`; returns those to be made again, by index."""
        self._warn_if_unloaded()
        loading = {actor.loading: actor for actor in self._actors if actor.loading is not None}
        references = [*running, *loading]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        if not ready:
            ready, _ = ray.wait(references, num_returns=1, timeout=WAIT_SECONDS, fetch_local=False)
        again = {}
        for reference in ready:
            if reference in loading:
                self._loaded(loading[reference])
                continue
            call = running.pop(reference)
            assert call.actor is not None
            call.actor.tasks -= 1
            try:
                ray.get(reference)
            except RayError as error:
                again[call.index] = self._failed(call, error)
            else:
                self._deaths = 0
                done[call.index] = call
        return again

    def _warn_if_unloaded(self) -> None:
        """Log once that no model has been loaded for a while: others may hold the resources."""
        if any(actor.loading is None for actor in self._actors):
            self._unloaded_since = None
        elif self._unloaded_since is None:
            self._unloaded_since = time.monotonic()
        elif time.monotonic() - self._unloaded_since > WARN_SECONDS:
            self._unloaded_since = math.inf
            logger.warning("no model is loaded: the pool needs %s, %s", self.layout, free_resources())

    def _loaded(self, actor: _Actor) -> None:
        """Take in what an actor loaded."""
        try:
            info: ModelInfo = ray.get(actor.loading)
        except RayTaskError as error:
            raise _reason(error) from None
        except RayError as error:
            self._replace(actor, error)
            return
        actor.loading, actor.info = None, info
        first = self._info = self._info or info
        for what, own, other in (
            ("another model", info.identity.fingerprint, first.identity.fingerprint),
            ("other versions", info.versions, first.versions),
        ):
            if own != other:
                raise ClusterError(f"node {info.node} has {what} than node {first.node}: {own}, not {other}")
        if info.hardware != first.hardware:
            message = "node %s computes on %s, node %s on %s: results can differ in the last bits from run to run"
            logger.warning(message, info.node, info.hardware, first.node, first.hardware)

    def _failed(self, call: _Call[Task], error: RayError) -> _Call[Task]:
        """The call, to be made again since its actor was lost. Raises any other error."""
        if isinstance(error, RayTaskError):
            raise _reason(error) from None
        call.attempts += 1
        if call.attempts >= ATTEMPTS:
            raise ClusterError(f"{call.task}: {ATTEMPTS} actors died with this task: {first_line(error)}")
        assert call.actor is not None
        self._replace(call.actor, error)
        return call

    def _replace(self, actor: _Actor, error: RayError) -> None:
        """Start an actor in place of one that died, on whatever node Ray finds for it."""
        if actor not in self._actors:
            return  # it had several tasks
        where = f"process {actor.info.pid} of node {actor.info.node}" if actor.info else "before it had loaded"
        logger.warning("an actor was lost, %s: its work is done again (%s)", where, first_line(error))
        self._deaths += 1
        if self._deaths > ATTEMPTS * len(self._actors):
            raise ClusterError(f"actors die before any work is done: {first_line(error)}")
        with suppress(RayError):
            ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._start()


def _reason(error: RayTaskError) -> Exception:
    """The error that an actor raised, if it is one of ours; else a ClusterError of one line."""
    cause = error.cause
    if isinstance(cause, (ModelError, CorpusError, RangeStoreError)):
        return cause
    return ClusterError(f"an actor failed: {type(cause).__name__}: {first_line(cause)}")
