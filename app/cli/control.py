"""What `ranges`, `erase` and `audit` act on: the store itself, or a running server that has it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from app.cli.exits import CommandError
from app.cli.server_control import ServerControl
from app.cli.stores import operator, settings_with, store_of, stores_of
from app.errors import CONFLICT, UNREACHABLE, USAGE
from range_store.domain.live import AuditEntry, LiveErasure, LiveState
from range_store.domain.range_set import check_dtype
from range_store.storage.range_sets import PublishedRangeSet
from range_store.storage.replicas import ReplicaWait
from range_store.storage.store import RangeStore

if TYPE_CHECKING:
    from app.settings import Settings

WAIT_SECONDS = 5.0
"""How long `--wait all` waits unless told otherwise."""
PAUSE = 0.02
"""Seconds between two looks at who follows."""


class Control(Protocol):
    """Range sets and live erasures of one model. Every change gives the live state that it made."""

    def range_sets(self) -> Sequence[PublishedRangeSet]:
        """All published range sets, newest first."""

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        """Make a range set the one that erasures use.

        Args:
            force: drop erasures that it cannot serve; take it though it was fitted in another dtype than is served.
        """

    def live(self) -> LiveState:
        """Active range set, live erasures that have not expired, and generation."""

    def switch_on(self, erasure: LiveErasure, *, expires_in: float | None, if_match: str | None) -> LiveState:
        """Erase a concept live, or change how; for `expires_in` seconds, or until somebody switches it off."""

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        """Erase a concept no more."""

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        """Erase nothing, in one generation."""

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        """The last changes, newest first."""


class StoreControl:
    """Control by the store itself; a running server follows through its change feed.

    Args:
        wait: seconds in which every running replica must follow a change; None: do not wait for them.
    """

    def __init__(self, store: RangeStore, wait: float | None = None) -> None:
        self.store = store
        self._wait = wait

    def range_sets(self) -> Sequence[PublishedRangeSet]:
        return self.store.list()

    def activate(self, range_set: str, *, force: bool, if_match: str | None) -> LiveState:
        if not force:
            check_dtype(self.store.provenance(range_set), self.store.replicas.read().dtypes)
        return self._followed(self.store.activate(range_set, force, if_match, by=operator()))

    def live(self) -> LiveState:
        return self._unexpired(self.store.live())

    def switch_on(self, erasure: LiveErasure, *, expires_in: float | None, if_match: str | None) -> LiveState:
        self.store.live()  # sets the clock
        now = self.store.clock.now()
        ends = None if expires_in is None else now + expires_in
        wanted = erasure.model_copy(update={"by": operator(), "since": now, "expires_at": ends})
        return self._followed(self.store.set_erasure(wanted, if_match))

    def switch_off(self, concept: str, *, reason: str | None, if_match: str | None) -> LiveState:
        return self._followed(self.store.remove_erasure(concept, if_match, by=operator(), reason=reason))

    def switch_all_off(self, *, reason: str | None, if_match: str | None) -> LiveState:
        return self._followed(self.store.set_erasures([], if_match, by=operator(), reason=reason))

    def audit(self, limit: int) -> Sequence[AuditEntry]:
        return self.store.audit(limit)

    def _unexpired(self, state: LiveState) -> LiveState:
        """The state without what has expired and was not yet taken out."""
        return state.model_copy(update={"erasures": state.at(self.store.clock.now())})

    def _followed(self, state: LiveState) -> LiveState:
        if self._wait is None:
            return self._unexpired(state)
        follow, ends = ReplicaWait(state.generation), time.monotonic() + self._wait
        while not follow.done(self.store.replicas.read()):
            if time.monotonic() >= ends:
                raise CommandError(
                    f"the change is made, as generation {state.generation}, but not in force everywhere after "
                    f"{self._wait:g} s: {follow.why()}",
                    UNREACHABLE,
                )
            time.sleep(PAUSE)
        return self._unexpired(state)


@contextmanager
def control_of(
    url: str | None,
    redis_url: str | None,
    data_dir: Path | None,
    name: str | None,
    *,
    publishes: bool = False,
    wait: float | None = None,
) -> Iterator[Control]:
    """The server at `url`, or, without one, the store. Options that name a store win over NEURONLENS_URL.

    Args:
        publishes: see `store_of`.
        wait: seconds in which every running replica must follow a change; None: do not wait for them.

    Raises:
        CommandError: both are named, or there is no telling which model is meant.
        StoreUnavailable: Redis cannot be reached.
    """
    settings, server_url = _where(url, redis_url, data_dir)
    if server_url:
        with ServerControl(server_url, name or settings.name, _api_key(settings), wait) as server:
            yield server
    else:
        with store_of(settings, name, publishes=publishes) as store:
            yield StoreControl(store, wait)


@contextmanager
def controls_of(
    url: str | None, redis_url: str | None, data_dir: Path | None, name: str | None
) -> Iterator[Mapping[str, Control]]:
    """As `control_of`; without a name, of every model that the server serves, or that has range sets in the store."""
    settings, server_url = _where(url, redis_url, data_dir)
    if not server_url:
        with stores_of(settings, name) as stores:
            yield {model: StoreControl(store) for model, store in stores.items()}
        return
    with ExitStack() as stack:
        key, chosen = _api_key(settings), name or settings.name
        first = stack.enter_context(ServerControl(server_url, chosen, key))
        names = [chosen] if chosen else first.models()
        yield {each: stack.enter_context(ServerControl(server_url, each, key)) for each in names}


def _where(url: str | None, redis_url: str | None, data_dir: Path | None) -> tuple["Settings", str | None]:
    """The settings, and the server's URL if it is a server."""
    if url and (redis_url or data_dir):
        raise CommandError("--url is a running server, --redis-url and --data-dir are a store: name one of them", USAGE)
    settings = settings_with(redis_url=redis_url, data_dir=data_dir, url=url)
    return settings, None if redis_url or data_dir else settings.url


def _api_key(settings: "Settings") -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key else None


def store_only(control: Control, command: str) -> RangeStore:
    """The store, for what has no HTTP route.

    Raises:
        CommandError: the control is a server.
    """
    if isinstance(control, StoreControl):
        return control.store
    raise CommandError(
        f"`ranges {command}` has no HTTP route: run it where the store is, with --redis-url or --data-dir", USAGE
    )


def find_range_set(control: Control, id_or_prefix: str) -> PublishedRangeSet:
    """The range set of that id, or the only one whose id begins so.

    Raises:
        UnknownRangeSet: there is none.
        CommandError: there are several.
    """
    from range_store.errors import UnknownRangeSet

    found = [each for each in control.range_sets() if each.id.startswith(id_or_prefix)]
    if not found:
        raise UnknownRangeSet(id_or_prefix)
    if len(found) > 1 and id_or_prefix not in [each.id for each in found]:
        raise CommandError(f"{id_or_prefix!r} begins several ids: {', '.join(each.id for each in found)}", CONFLICT)
    return next((each for each in found if each.id == id_or_prefix), found[0])
