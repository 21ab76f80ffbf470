"""The store or the running server that `ranges`, `erase` and `audit` act on."""

import getpass
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from app.cli.exits import CommandError
from app.cli.options import STORE_PANEL, setting, settings_with
from app.cli.server_control import ServerControl
from app.errors import CONFLICT, UNREACHABLE, USAGE
from app.settings import Settings
from range_store.domain.live import AuditEntry, LiveErasure, LiveState
from range_store.domain.range_set import check_dtype
from range_store.storage.range_sets import PublishedRangeSet
from range_store.storage.replicas import ReplicaWait
from range_store.storage.store import RangeStore

POLL_SECONDS = 0.02
"""Interval at which `--wait all` checks the replicas."""


class Control(Protocol):
    """Range sets and live erasures of one model. Every change returns the new live state."""

    def range_sets(self) -> Sequence[PublishedRangeSet]:
        """All published range sets, newest first."""

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        """Activate a range set.

        Args:
            force: drop live erasures that it does not support, and accept another dtype than the served one.
        """

    def live(self) -> LiveState:
        """Active range set, unexpired live erasures, and generation."""

    def switch_on(self, erasure: LiveErasure, *, expires_in: float | None, if_match: str | None) -> LiveState:
        """Add or change a live erasure. It expires after `expires_in` seconds, if set."""

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        """Remove the live erasure of a concept."""

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        """Remove all live erasures in one generation."""

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        """The last changes, newest first."""


class StoreControl:
    """Control of the store itself. Running servers follow its change feed.

    Args:
        wait: seconds to wait for all running replicas to apply a change; None: do not wait.
    """

    def __init__(self, store: RangeStore, wait: float | None = None) -> None:
        self.store = store
        self._wait = wait

    def range_sets(self) -> Sequence[PublishedRangeSet]:
        return self.store.range_sets.list()

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        if not force:
            check_dtype(self.store.range_sets.provenance(range_set), self.store.replicas.read().dtypes)
        return self._applied(self.store.activate(range_set, force, if_match, by=operator()))

    def live(self) -> LiveState:
        return self._unexpired(self.store.live_state())

    def switch_on(self, erasure: LiveErasure, *, expires_in: float | None, if_match: str | None) -> LiveState:
        self.store.live_state()  # sets the clock
        now = self.store.clock.now()
        ends = None if expires_in is None else now + expires_in
        changed = erasure.model_copy(update={"by": operator(), "since": now, "expires_at": ends})
        return self._applied(self.store.set_erasure(changed, if_match))

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        return self._applied(self.store.remove_erasure(concept, if_match, by=operator(), reason=reason))

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        return self._applied(self.store.set_erasures([], if_match, by=operator(), reason=reason))

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        return self.store.audit(limit)

    def _unexpired(self, state: LiveState) -> LiveState:
        """The state without expired erasures that are still stored."""
        return state.model_copy(update={"erasures": state.active_at(self.store.clock.now())})

    def _applied(self, state: LiveState) -> LiveState:
        if self._wait is None:
            return self._unexpired(state)
        follow, ends = ReplicaWait(state.generation), time.monotonic() + self._wait
        while not follow.done(self.store.replicas.read()):
            if time.monotonic() >= ends:
                raise CommandError(
                    f"the change is stored as generation {state.generation}, but not all replicas applied it within "
                    f"{self._wait:g} s: {follow.why()}",
                    UNREACHABLE,
                )
            time.sleep(POLL_SECONDS)
        return self._unexpired(state)


@dataclass(frozen=True)
class ControlOptions:
    """A server or a store, and a model there. Options that name a store take precedence over NEURONLENS_URL."""

    url: Annotated[str | None, setting("url")] = None
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="Served name of the model. Default: NEURONLENS_NAME, else the store's only model, or the "
            "server's first.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = None
    redis_url: Annotated[str | None, setting("redis_url")] = None
    data_dir: Annotated[Path | None, setting("data_dir")] = None

    @contextmanager
    def open(self, *, name: str | None = None, publishes: bool = False, wait: float | None = None) -> Iterator[Control]:
        """Control of one model.

        Args:
            name: the model, whatever --name says.
            publishes: see `open_store`.
            wait: seconds to wait for all running replicas to apply a change; None: do not wait.

        Raises:
            CommandError: both a server and a store are named, or it is unclear which model to use.
            StoreUnavailable: Redis cannot be reached.
        """
        settings, server_url = self._target()
        chosen = name or self.name
        if server_url:
            with closing(ServerControl(server_url, chosen or settings.name, _api_key(settings), wait)) as server:
                yield server
        else:
            with open_store(settings, chosen, publishes=publishes) as store:
                yield StoreControl(store, wait)

    @contextmanager
    def open_each(self) -> Iterator[Mapping[str, Control]]:
        """Control of the named model; without a name, of each served model, or each with range sets in the store."""
        from range_store.embedded.connection import connect

        settings, server_url = self._target()
        with ExitStack() as stack:
            if not server_url:
                client = stack.enter_context(connect(**settings.redis))
                chosen = self.name or _name_of(settings)
                names = [chosen] if chosen else _models(client)
                yield {each: StoreControl(RangeStore(client, each)) for each in names}
                return
            key, chosen = _api_key(settings), self.name or settings.name
            names = [chosen] if chosen else stack.enter_context(closing(ServerControl(server_url, None, key))).models()
            yield {each: stack.enter_context(closing(ServerControl(server_url, each, key))) for each in names}

    def _target(self) -> tuple[Settings, str | None]:
        """The settings, and the URL of the server if the target is one."""
        if self.url and (self.redis_url or self.data_dir):
            raise CommandError("--url is a server, --redis-url and --data-dir are a store: pass one of them", USAGE)
        settings = settings_with(redis_url=self.redis_url, data_dir=self.data_dir, url=self.url)
        return settings, None if self.redis_url or self.data_dir else settings.url


def _api_key(settings: Settings) -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key else None


@contextmanager
def open_store(settings: Settings, name: str | None = None, *, publishes: bool = False) -> Iterator[RangeStore]:
    """The store of the model with this name; by default the settings' model, else the only one with range sets.

    Args:
        publishes: allow Redis the time that writing a large range set takes.

    Raises:
        CommandError: no name was given, and not exactly one model has range sets.
        StoreUnavailable: Redis cannot be reached.
    """
    from range_store.embedded.connection import ANSWER_TIMEOUT, TRANSFER_TIMEOUT, connect

    timeout = TRANSFER_TIMEOUT if publishes else ANSWER_TIMEOUT
    with connect(**settings.redis, timeout=timeout) as client:
        yield RangeStore(client, name or _name_of(settings) or _only_model(client))


def _name_of(settings: Settings) -> str | None:
    return settings.served_name if settings.model else settings.name


def _only_model(client: Any) -> str:
    found = _models(client)
    if len(found) > 1:
        raise CommandError(f"several models have range sets: choose one with --name: {', '.join(found)}", USAGE)
    return found[0]


def _models(client: Any) -> list[str]:
    """Names of the models with range sets. Raises CommandError if there are none."""
    from range_store.redis_errors import translate_redis_errors
    from range_store.storage.schema import ModelKeys

    prefix = ModelKeys("").range_sets
    with translate_redis_errors():
        found = sorted(key.decode().removeprefix(prefix) for key in client.scan_iter(f"{prefix}*"))
    if not found:
        raise CommandError(
            "no model has range sets in this store: fit one with `neuronlens fit`, or pass --name", CONFLICT
        )
    return found


def operator() -> str:
    """The user in audit entries of the command line."""
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # a user id without a name, as in containers
        return "cli"
