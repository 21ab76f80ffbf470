"""Restores the live state from a server's snapshot after Redis lost it."""

import logging
import shlex
from contextlib import suppress

from range_store.domain.live import LiveState
from range_store.domain.range_set import check_model
from range_store.errors import (
    ForeignRangeSet,
    InvalidRangeSet,
    LiveStateLost,
    RangeStoreError,
    StoreUnavailable,
    UnknownRangeSet,
)
from range_store.storage.store import RangeStore

log = logging.getLogger(__name__)


class LiveStateRecovery:
    """Compares what Redis stores with what a server held before, and restores what is missing.

    Args:
        fingerprints: of the model in use, by this version and by earlier ones; other range sets are refused.
    """

    def __init__(self, store: RangeStore, fingerprints: tuple[str, str | None]) -> None:
        self._store = store
        self._fingerprints = fingerprints

    def restore(self, held: LiveState, stored: LiveState | None) -> LiveState:
        """Return `stored`, or the live state after everything that Redis has lost of `held` was restored.

        Raises:
            LiveStateLost: it cannot be restored until an operator acts; the message says how.
            ForeignRangeSet: the range set to restore is of another model.
        """
        wanted = self._store.recovered(held, stored)
        if wanted is None:
            assert stored is not None
            return stored
        why, range_set = _describe_loss(held, stored), wanted.range_set
        try:
            if range_set is not None:
                check_model(self._store.range_sets.provenance(range_set), *self._fingerprints)
            state, restored = self._store.restore(held)
        except (StoreUnavailable, ForeignRangeSet):
            raise
        except UnknownRangeSet:
            name = shlex.quote(self._store.model)
            raise LiveStateLost(
                f"{why}, and range set {range_set} too. Restore it with `neuronlens ranges import FILE --activate "
                f"--name {name}`, or fit again with `neuronlens fit … --activate --name {name}`; this server then "
                "restores the live erasures"
            ) from None
        except RangeStoreError as error:
            raise LiveStateLost(
                f"{why}, and range set {range_set}, which is active now, cannot serve the earlier erasures ({error}): "
                "activate another one, or switch on each erasure again with `neuronlens erase on`"
            ) from None
        if restored:
            fields = {"model": self._store.model, "generation": held.generation}
            log.warning("%s: %s; restored as generation %s", self._store.model, why, state.generation, extra=fields)
        return state

    def before_change(self, held: LiveState | None, stored: LiveState | None, activates: bool) -> bool:
        """Restore what Redis has lost before a change of the live state; returns whether something was restored.

        Raises:
            LiveStateLost: it cannot be restored, and the change would go on without it. Activating another range set
                is allowed all the same: the erasures are then restored on that.
            ForeignRangeSet: the active range set is of another model, and the change does not activate another one.
        """
        if held is not None and stored != held:
            try:
                if self.restore(held, stored) != stored:
                    return True
            except (LiveStateLost, ForeignRangeSet):
                if not activates or (stored is not None and held.is_at_least(stored.generation)):
                    raise
        if stored is not None and stored.range_set is not None and not activates:
            with suppress(UnknownRangeSet, InvalidRangeSet):
                check_model(self._store.range_sets.provenance(stored.range_set), *self._fingerprints)
        return False


def _describe_loss(held: LiveState, stored: LiveState | None) -> str:
    if stored is None:
        return "Redis has lost the live state (was it emptied?)"
    if stored.generation == held.generation:
        return f"Redis holds another state as generation {held.generation} (was an older copy of it changed?)"
    if held.is_at_least(stored.generation):
        return f"Redis went back from generation {held.generation} to {stored.generation} (is it an older copy?)"
    return f"Redis has lost the live state (it starts again at {stored.generation})"
