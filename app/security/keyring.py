"""The API keys of one server: read with the live state, in force while Redis is unreachable, never lost."""

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
    """The API keys in force.

    Callers need a key from the first key on, for good: a server that has seen keys remembers it in a file, so that a
    Redis that lost them admits nobody. The keys that were last read stay in force while Redis is unreachable or empty.
    Of two lists the one that was changed later counts, so that an old copy of Redis restores no revoked key.

    Args:
        required: refuse every call while no keys are known, even if there never were any.
        memory: the file that remembers; None: nothing outlives the process.
    """

    def __init__(self, store: ApiKeyStore, *, required: bool = False, memory: Path | None = None) -> None:
        self._store = store
        self._memory = memory
        self._required = required or (memory is not None and memory.exists())
        self._known: ApiKeys | None = None
        self._problem: str | None = None
        self._reported: set[str] = set()
        self._refreshing = threading.Lock()

    @property
    def in_force(self) -> bool:
        """Whether a caller needs a key."""
        return self._required

    def refresh(self) -> None:
        """Read the keys. If they cannot be read, log the reason once and keep those that are known."""
        with self._refreshing:
            try:
                found = self._store.read()
            except RangeStoreError as error:
                self._log_problem(f"the API keys cannot be read: {error}")
                return
            if found is not None and (self._known is None or found.changed_at >= self._known.changed_at):
                self._accept(found)
                self._log_problem(None)
            elif found is not None:
                self._log_problem("Redis holds older API keys than those in force (was an old copy restored?)")
            elif self._known is not None:
                self._log_problem(LOST)
            elif self._required:
                self._log_problem("there are no API keys: create one with `neuronlens keys create`")
            else:
                self._log_problem(None)

    def identify(self, token: str | None) -> ApiKey:
        """The API key of a token.

        Raises:
            Refused: there is no token, it is wrong, revoked or expired, or no keys are known.
        """
        known = self._known
        if known is None:
            detail = (
                "API keys cannot be checked: the store is unreachable, or has no key yet (`neuronlens keys create`)"
            )
            raise Refused("keys_unavailable", detail)
        if token is None:
            detail = "an API key is required: send it as `Authorization: Bearer …` or `X-API-Key: …`"
            raise Refused("no_key", detail)
        key = known.find_by_token(token)
        if key is None or not key.is_valid(self._store.clock.now()):
            raise Refused("bad_key", "this API key is wrong, revoked or expired")
        if not _readable(key):
            raise Refused("bad_key", "this API key is damaged: an operator must revoke it and create another")
        return key

    def still_opens(self, key: ApiKey | None, scope: Scope) -> bool:
        """Whether a caller that was admitted with this key (None: without one) would be admitted again."""
        if key is None:
            return not self.in_force
        held = self._known.keys if self._known is not None else ()
        found = next((each for each in held if each.id == key.id), None)
        return found is not None and found.is_valid(self._store.clock.now()) and found.allows(scope)

    def _accept(self, found: ApiKeys) -> None:
        for key in found.valid(self._store.clock.now()):
            if not _readable(key) and key.id not in self._reported:
                self._reported.add(key.id)
                logger.error(
                    "the rate limit of the API key %s is unreadable (did another version write it?), so the key is "
                    "refused: run `neuronlens keys revoke %s`, and create another",
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
                    "calls stay refused if the keys are lost before the next start",
                    self._memory,
                    error.strerror,
                )

    def _log_problem(self, problem: str | None) -> None:
        if problem is not None and problem != self._problem:
            effect = "the known keys stay in force" if self._known is not None else "every call is refused"
            logger.error("%s; %s", problem, effect if self._required else "calls still need no key")
        elif problem is None and self._problem is not None:
            logger.info("the API keys are up to date again")
        self._problem = problem


def _readable(key: ApiKey) -> bool:
    """Whether the key's rate limit can be read; without it, the key would allow more than was granted."""
    try:
        return key.rate_limit is None or rate(key.rate_limit) is not None
    except ValueError:
        return False


def memory_of(data_dir: Path, store: str) -> Path:
    """The file in which a server of `data_dir` remembers that keys were in force on one Redis.

    Args:
        store: identifies the Redis; only its hash is in the file's name.
    """
    return data_dir / "keys-in-force" / hashlib.sha256(store.encode()).hexdigest()[:16]
