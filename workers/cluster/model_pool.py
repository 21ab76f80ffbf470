"""A pool of models on the nodes of a Ray cluster that work is handed to.

Where a model runs, and on which node another one starts in the place of one that died, is Ray's work. Ours is that
each piece of work counts once: a result is taken in the order of the pieces, and a piece whose model died is handed
out again.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from range_store.domain.range_set import ModelIdentity
from range_store.errors import RangeStoreError
from workers.cluster.connection import TELL_SECONDS, free_resources
from workers.cluster.errors import ClusterError, first_line
from workers.corpora.errors import CorpusError
from workers.models.errors import ModelError
from workers.models.loading import LoadedModel, load_model, use_threads
from workers.models.predictions import Head

logger = logging.getLogger(__name__)

PER_ACTOR = 2
"""Pieces of work that an actor is given at once: the next one is there when it is done with one."""
ATTEMPTS = 4
"""So many times a piece of work is handed out when whoever has it dies."""
WAIT_SECONDS = 0.5

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PoolLayout:
    """How models are spread: so many actors, each with so many CPU threads, on a GPU of its own or on none."""

    actors: int
    threads: int
    gpu: bool

    @classmethod
    def of(cls, actors: int | None, threads: int | None, device: str) -> "PoolLayout":
        """What the cluster has room for, where it is not said.

        Args:
            actors: None: one per GPU, or without GPUs one per node.
            threads: of each; None: an equal share of the CPUs of its node.
            device: "auto" takes GPUs where the cluster has some.

        Raises:
            ClusterError: a GPU is wanted and there is none, or one by its number; or there is no CPU. Where both
                numbers are given, nodes are waited for.
        """
        if device.startswith("cuda:"):
            raise ClusterError(f"with --ray the cluster chooses the GPU: --device cuda instead of {device}")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        gpu = device == "cuda" or (device == "auto" and bool(with_gpu))
        hosts = with_gpu if gpu else [node for node in nodes if node.get("CPU", 0) >= 1]
        if not hosts and actors and threads:  # nodes may be still to come, where they are started on demand
            return cls(actors, threads, gpu)
        if not hosts:
            offered = "has a GPU: --device cpu" if gpu else "offers a CPU"
            raise ClusterError(f"no node of the cluster {offered}; --actors and --threads wait for nodes to come")
        wanted = actors or (sum(int(node["GPU"]) for node in hosts) if gpu else len(hosts))
        share = int(min(node.get("CPU", 1) for node in hosts)) // math.ceil(wanted / len(hosts))
        return cls(wanted, threads or max(1, share), gpu)

    def __str__(self) -> str:
        return f"{self.actors} × {self.threads} CPUs" + (" and a GPU" if self.gpu else "")


@dataclass(frozen=True)
class ModelInfo:
    """What an actor loaded, and where."""

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
    """A model on some node. Not a class of Ray's: `ModelPool` makes actors of it."""

    def __init__(self, source: str, choices: Mapping[str, Any], threads: int) -> None:
        self._source, self._choices, self._threads = source, choices, threads
        self._model: LoadedModel | None = None
        self._made: dict[str, Callable[[Any], Any]] = {}

    def load(self) -> ModelInfo:
        """Load the model. Not done by `__init__`, whose errors Ray would wrap. Raises ModelError."""
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

    def work(self, key: str, make: Callable[[LoadedModel, Any], Callable[[Any], Any]], shared: Any, task: Any) -> Any:
        """Seconds that it took, and what `make(model, shared)`, made once per key, gives for the task."""
        started = time.monotonic()
        assert self._model is not None
        if key not in self._made:
            self._made = {key: make(self._model, shared)}
        result = self._made[key](task)
        return time.monotonic() - started, result


@dataclass(frozen=True, eq=False)
class ActorFunction(Generic[Task, Result]):
    """Work of one kind: `make(model, shared)` gives what is called with every task; `shared` is sent to a node once."""

    make: Callable[[LoadedModel, Any], Callable[[Task], Result]]
    shared: Any  # a reference to it
    key: str

    @classmethod
    def of(
        cls, make: Callable[[LoadedModel, Any], Callable[[Task], Result]], shared: Any
    ) -> "ActorFunction[Task, Result]":
        kept = ray.put(shared)
        return cls(make, kept, kept.hex())


@dataclass(eq=False)
class _Member:
    handle: Any
    loading: Any
    about: ModelInfo | None = None
    in_hand: int = 0

    @property
    def ready(self) -> bool:
        return self.loading is None


@dataclass(eq=False)
class _Piece(Generic[Task]):
    """A piece of work; `said` and `result` refer to what its actor gives, the first of it small."""

    place: int
    task: Task
    attempts: int = 0
    member: _Member | None = None
    said: Any = None
    result: Any = None
    seconds: float = 0.0


@dataclass(eq=False)
class ModelPool:
    """Models on the nodes of the cluster that this process is connected to.

    Args:
        source, choices: arguments of `load_model`.
        check_cancelled: called about twice a second during a wait, and with each result; its exceptions end the work.
    """

    source: str
    choices: Mapping[str, Any]
    layout: PoolLayout
    check_cancelled: Callable[[], None] = lambda: None
    _members: list[_Member] = field(default_factory=list)
    _deaths: int = 0
    _about: ModelInfo | None = None
    _without_since: float | None = None

    def __enter__(self) -> "ModelPool":
        self._members = [self._start() for _ in range(self.layout.actors)]
        return self

    def __exit__(self, *error: object) -> None:
        for member in self._members:
            with suppress(RayError):
                ray.kill(member.handle)

    @property
    def model_info(self) -> ModelInfo:
        """What all actors loaded; waits for the first of them. Raises ModelError, ClusterError."""
        while self._about is None:
            self._wait({}, {})
        return self._about

    def map(self, job: ActorFunction[Task, Result], tasks: Iterator[Task]) -> Iterator[tuple[Task, Result, float]]:
        """Each task, in their order, with its result and the seconds that it took.

        Tasks are taken as actors come free, and only so many ahead of the first that is not done that memory does not
        grow with their number.

        Raises:
            ModelError, CorpusError, RangeStoreError: an actor said so.
            ClusterError: anything else went wrong there, or actors died again and again.
        """
        yield from self._in_order(job, tasks, PER_ACTOR)

    def call(self, job: ActorFunction[Task, Result], task: Task) -> Result:
        """One task, done now, whatever else is in hand."""
        (done,) = self._in_order(job, iter((task,)), math.inf)
        return done[1]

    def _in_order(
        self, job: ActorFunction[Task, Result], tasks: Iterator[Task], at_once: float
    ) -> Iterator[tuple[Task, Result, float]]:
        in_hand: dict[Any, _Piece[Task]] = {}
        try:
            yield from self._handed(job, tasks, at_once, in_hand)
        finally:
            for piece in in_hand.values():  # nobody waits for these any more, and their actors are there for other work
                assert piece.member is not None
                piece.member.in_hand -= 1

    def _handed(
        self, job: ActorFunction[Task, Result], tasks: Iterator[Task], at_once: float, in_hand: dict[Any, _Piece[Task]]
    ) -> Iterator[tuple[Task, Result, float]]:
        window = (PER_ACTOR + 1) * len(self._members)
        again: list[_Piece[Task]] = []
        done: dict[int, _Piece[Task]] = {}
        taken = given = 0
        more = True
        while more or again or in_hand or done:
            while (again or (more and taken - given < window)) and (member := self._free(at_once)) is not None:
                if again:
                    piece = min(again, key=lambda each: each.place)
                    again.remove(piece)
                elif (task := next(tasks, None)) is not None:
                    piece = _Piece(taken, task)
                    taken += 1
                else:
                    more = False
                    break
                self._hand(job, piece, member)
                in_hand[piece.said] = piece
            while given in done:
                piece = done.pop(given)
                try:
                    result = ray.get(piece.result)
                except RayError as error:
                    again.append(self._failed(piece, error))
                    break
                piece.result = None
                given += 1
                yield piece.task, result, piece.seconds
                self.check_cancelled()
            if in_hand or self._free(at_once) is None:
                again += self._wait(in_hand, done)

    def _start(self) -> _Member:
        resources = {"num_cpus": self.layout.threads, "num_gpus": int(self.layout.gpu)}
        actor = ray.remote(ModelActor).options(**resources, max_restarts=0)  # `_failed` starts another
        handle = actor.remote(self.source, dict(self.choices), self.layout.threads)
        return _Member(handle, handle.load.remote())

    def _free(self, at_once: float) -> _Member | None:
        """The idlest model, if it has less than so much work in hand."""
        ready = [member for member in self._members if member.ready and member.in_hand < at_once]
        return min(ready, key=lambda member: member.in_hand, default=None)

    def _hand(self, job: ActorFunction[Task, Result], piece: _Piece[Task], member: _Member) -> None:
        work = member.handle.work.options(num_returns=2)
        piece.said, piece.result = work.remote(job.key, job.make, job.shared, piece.task)
        piece.member = member
        member.in_hand += 1

    def _wait(self, in_hand: dict[Any, _Piece[Task]], done: dict[int, _Piece[Task]]) -> list[_Piece[Task]]:
        """Wait a while for what comes first, and put it into `done`; gives the pieces that must be handed out again."""
        self.check_cancelled()
        self._tell()
        loading = {member.loading: member for member in self._members if member.loading is not None}
        refs = [*in_hand, *loading]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        if not ready:
            ready, _ = ray.wait(refs, num_returns=1, timeout=WAIT_SECONDS, fetch_local=False)
        again = []
        for ref in ready:
            if ref in loading:
                self._loaded(loading[ref])
                continue
            piece = in_hand.pop(ref)
            assert piece.member is not None
            piece.member.in_hand -= 1
            try:
                piece.seconds = ray.get(ref)
            except RayError as error:
                again.append(self._failed(piece, error))
            else:
                self._deaths = 0
                done[piece.place] = piece
        return again

    def _tell(self) -> None:
        """Say so when there has been no model for a while, at first or as all were lost: others may have the room."""
        if any(member.ready for member in self._members):
            self._without_since = None
        elif self._without_since is None:
            self._without_since = time.monotonic()
        elif time.monotonic() - self._without_since > TELL_SECONDS:
            self._without_since = math.inf  # it is said once
            logger.warning("no model is loaded: %s were asked for, %s", self.layout, free_resources())

    def _loaded(self, member: _Member) -> None:
        """An actor that loads its model is done with it, one way or another."""
        try:
            about: ModelInfo = ray.get(member.loading)
        except RayTaskError as error:
            raise _reason(error) from None
        except RayError as error:
            self._replace(member, error)
            return
        member.loading, member.about = None, about
        self._about = self._about or about
        for what, own, other in (
            ("another model", about.identity.fingerprint, self._about.identity.fingerprint),
            ("other versions", about.versions, self._about.versions),
        ):
            if own != other:
                raise ClusterError(f"node {about.node} has {what} than node {self._about.node}: {own}, not {other}")
        if about.hardware != self._about.hardware:
            logger.warning(
                "node %s computes on %s, node %s on %s: results can differ in the last bits from run to run",
                about.node,
                about.hardware,
                self._about.node,
                self._about.hardware,
            )

    def _failed(self, piece: _Piece[Task], error: RayError) -> _Piece[Task]:
        """The piece, to be handed out again, and its actor replaced; or what the error says, raised."""
        if isinstance(error, RayTaskError):
            raise _reason(error) from None
        piece.attempts += 1
        if piece.attempts >= ATTEMPTS:
            raise ClusterError(f"{piece.task}: whoever was given it died, {ATTEMPTS} times: {first_line(error)}")
        assert piece.member is not None
        self._replace(piece.member, error)
        return piece

    def _replace(self, member: _Member, error: RayError) -> None:
        """Start an actor in the place of one that died, on whatever node Ray finds for it."""
        if member not in self._members:
            return  # several pieces were in its hands
        where = f"process {member.about.pid} of node {member.about.node}" if member.about else "before it had loaded"
        logger.warning("an actor was lost, %s: its work is done again (%s)", where, first_line(error))
        self._deaths += 1
        if self._deaths > ATTEMPTS * len(self._members):
            raise ClusterError(f"actors die before any work is done: {first_line(error)}")
        with suppress(RayError):
            ray.kill(member.handle)
        self._members[self._members.index(member)] = self._start()


def _reason(error: RayTaskError) -> Exception:
    """What an actor raised: as it is where it says what to do, else in one line."""
    cause = error.cause
    if isinstance(cause, (ModelError, CorpusError, RangeStoreError)):
        return cause
    return ClusterError(f"an actor failed: {type(cause).__name__}: {first_line(cause)}")
