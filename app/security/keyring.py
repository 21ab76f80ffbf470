"""The API keys as one server knows them: read with the live state, in force while the store is away, never lost."""

import hashlib
import logging
import threading
from pathlib import Path

from app.http.problems import ApiError
from app.rates import rate
from range_store.atomic_files import make_private_directory
from range_store.errors import RangeStoreError
from range_store.storage.api_keys import ApiKey, ApiKeys, ApiKeyStore, Scope

logger = logging.getLogger(__name__)

LOST = "Redis has lost the API keys (was it emptied?)"


class Refused(ApiError):
    """A caller is refused; `code` is one of `REASONS`."""

    def __init__(self, code: str, detail: str, retry_after: int | None = None) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if code in _CHALLENGES:
            headers["WWW-Authenticate"] = _CHALLENGES[code]
        super().__init__(code, detail, headers)


REASONS = ("no_key", "bad_key", "wrong_scope", "rate_limited", "keys_unavailable")
_CHALLENGES = {
    "no_key": "Bearer",
    "bad_key": 'Bearer error="invalid_token"',
    "wrong_scope": 'Bearer error="insufficient_scope"',
}


class Keyring:
    """Who may come in.

    Keys are in force as soon as one was ever made, and from then on: a server that saw keys remembers so in a file, so
    that a Redis that forgot them opens nothing. What was last read stays in force while Redis is away or empty. Of two
    lists the one that was changed later counts, so an old copy of Redis brings no revoked key back.

    Args:
        required: refuse everyone while no keys are known, whether or not there ever were any.
        memory: the file that remembers; None: nothing outlives the process.
    """

    def __init__(self, store: ApiKeyStore, *, required: bool = False, memory: Path | None = None) -> None:
        self._store = store
        self._memory = memory
        self._required = required or (memory is not None and memory.exists())
        self._known: ApiKeys | None = None
        self._problem: str | None = None
        self._told: set[str] = set()
        self._refreshing = threading.Lock()

    @property
    def in_force(self) -> bool:
        """Whether a caller needs a key."""
        return self._required

    def refresh(self) -> None:
        """Read the keys. What is wrong is logged, once, and what was known stays."""
        with self._refreshing:
            try:
                found = self._store.read()
            except RangeStoreError as error:
                self._note(f"the API keys cannot be read: {error}")
                return
            if found is not None and (self._known is None or found.changed_at >= self._known.changed_at):
                self._take(found)
                self._note(None)
            elif found is not None:
                self._note("Redis holds older API keys than those in force (was an old copy restored?)")
            elif self._known is not None:
                self._note(LOST)
            elif self._required:
                self._note("there are no API keys: create one with `neuronlens keys create`")
            else:
                self._note(None)

    def identify(self, token: str | None) -> ApiKey:
        """The key of a caller.

        Raises:
            Refused: without a token, with a wrong, revoked or expired one, or if no keys are known.
        """
        known = self._known
        if known is None:
            detail = "no API keys can be checked: the store is away, or no key exists yet (`neuronlens keys create`)"
            raise Refused("keys_unavailable", detail)
        if token is None:
            detail = "an API key is needed: send it as `Authorization: Bearer …` or `X-API-Key: …`"
            raise Refused("no_key", detail)
        key = known.find_by_token(token)
        if key is None or not key.good(self._store.clock.now()):
            raise Refused("bad_key", "this API key is wrong, revoked or expired")
        if not _readable(key):
            raise Refused("bad_key", "this API key is damaged: whoever made it must revoke it and make another")
        return key

    def still_opens(self, key: ApiKey | None, scope: Scope) -> bool:
        """Whether who came in with this key (None: without one) would be let in again."""
        if key is None:
            return not self.in_force
        held = self._known.keys if self._known is not None else ()
        found = next((each for each in held if each.id == key.id), None)
        return found is not None and found.good(self._store.clock.now()) and found.may(scope)

    def _take(self, found: ApiKeys) -> None:
        for key in found.good(self._store.clock.now()):
            if not _readable(key) and key.id not in self._told:
                self._told.add(key.id)
                logger.error(
                    "the rate of the API key %s is unreadable (did another version write it?), and so the key opens "
                    "nothing: `neuronlens keys revoke %s`, and make another",
                    key.name,
                    key.id,
                )
        self._known = found
        self._required = True
        if self._memory is not None and not self._memory.exists():
            try:
                make_private_directory(self._memory.parent)
                self._memory.touch(mode=0o600)
            except OSError as error:
                logger.warning(
                    "cannot remember in %s that API keys are in force (%s): set NEURONLENS_REQUIRE_KEYS=true, so that "
                    "a start without them opens nothing",
                    self._memory,
                    error.strerror,
                )

    def _note(self, problem: str | None) -> None:
        if problem is not None and problem != self._problem:
            rest = "those known here stay in force" if self._known is not None else "everyone is refused"
            logger.error("%s; %s", problem, rest if self._required else "no key was needed before, and none is now")
        elif problem is None and self._problem is not None:
            logger.info("the API keys are current again")
        self._problem = problem


def _readable(key: ApiKey) -> bool:
    """Whether its rate can be kept: a key without its bound would be more than was given."""
    try:
        return key.rate_limit is None or rate(key.rate_limit) is not None
    except ValueError:
        return False


def memory_of(data_dir: Path, store: str) -> Path:
    """The file in which a server of `data_dir` remembers that keys were in force on one Redis.

    Args:
        store: what tells one Redis from another; only a hash of it is in the file's name.
    """
    return data_dir / "keys-in-force" / hashlib.sha256(store.encode()).hexdigest()[:16]
