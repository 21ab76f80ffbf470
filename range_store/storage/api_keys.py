"""API keys: who may call a server. All servers on one Redis share them.

A token is shown once, when its key is created. The store holds its SHA-256, which suffices for 32 random bytes: a slow
hash protects secrets that can be guessed. All keys are one JSON document, changed by compare-and-set. Once the document
exists keys are required, even if it lists none.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from typing import Annotated, Literal, Protocol

import redis
from pydantic import Field, ValidationError

from range_store.domain.erasure import FrozenModel
from range_store.errors import InvalidKey, StoreUnavailable, UnknownKey
from range_store.redis_errors import translate_redis_errors
from range_store.storage.clock import StoreClock
from range_store.storage.schema import API_KEYS, CHANGE_DOCUMENT, CHANGES

Scope = Literal["infer", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "read", "admin")
"""What a key allows: `infer` classifies, `read` inspects, `admin` changes live state and includes the other two."""
REVOKED_KEPT = 100
"""Revoked keys that the document keeps, as a record of who held them and until when."""
ATTEMPTS = 50
TOKEN = re.compile(r"nl_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]

_EXPECTED = {
    "name": "a key's name has 1 to 64 letters, digits and . _ @ -, and begins with a letter or digit",
    "scopes": f"a key needs at least one scope: {', '.join(SCOPES)}",
}


class ApiKey(FrozenModel):
    """A stored key, without its token. Times are Unix seconds.

    `rate_limit`: in the notation of the `limits` package ("600/minute"); None: the server's default.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    name: Name
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: float
    created_by: str | None = None
    expires_at: float | None = None
    rate_limit: str | None = None
    revoked_at: float | None = None
    revoked_by: str | None = None

    def is_valid(self, now: float) -> bool:
        """Whether it is neither revoked nor expired at Unix time `now`."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)

    def allows(self, scope: Scope) -> bool:
        """Whether the key has a scope."""
        return scope in self.scopes or "admin" in self.scopes


class ApiKeys(FrozenModel):
    """All keys. Of two documents the one with the later `changed_at` is newer."""

    changed_at: float
    keys: tuple[ApiKey, ...] = ()

    def find_by_token(self, token: str) -> ApiKey | None:
        """Return the key of a token, even if revoked or expired, or None. Takes equally long for a wrong token."""
        matched = TOKEN.fullmatch(token)
        digest = _digest(token)
        found = next((each for each in self.keys if matched and each.id == matched[1]), None)
        same = hmac.compare_digest(found.sha256 if found else _digest(""), digest)
        return found if found and same else None

    def valid(self, now: float) -> tuple[ApiKey, ...]:
        """Return the keys that are valid at Unix time `now`."""
        return tuple(each for each in self.keys if each.is_valid(now))


class ApiKeyStore:
    """The keys in Redis; safe to use from any thread. Every method raises StoreUnavailable if Redis is away."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._change_document = client.register_script(CHANGE_DOCUMENT)
        self.clock = StoreClock()
        """The clock by which keys expire, set by the first read."""

    def read(self) -> ApiKeys | None:
        """Return all keys, or None if there never were any, or Redis was emptied.

        Raises:
            InvalidKey: the document is unreadable.
        """
        return self._read()[1]

    def create(
        self,
        name: str,
        scopes: Iterable[Scope],
        *,
        expires_at: float | None = None,
        rate_limit: str | None = None,
        by: str | None = None,
    ) -> tuple[ApiKey, str]:
        """Create a key, and return it with its token, which is not stored.

        Raises:
            InvalidKey: the name is invalid or taken, or there is no scope.
        """
        id_ = secrets.token_hex(4)
        token = f"nl_{id_}_{secrets.token_urlsafe(32)}"
        wanted = set(scopes)
        try:
            key = ApiKey(
                id=id_,
                name=name,
                scopes=tuple(scope for scope in SCOPES if scope in wanted),
                sha256=_digest(token),
                created_at=self.clock.now(),
                created_by=by,
                expires_at=expires_at,
                rate_limit=rate_limit,
            )
        except ValidationError as error:
            field = str(error.errors()[0]["loc"][0])
            raise InvalidKey(_EXPECTED.get(field, f"invalid {field} of a key")) from None

        def add(keys: tuple[ApiKey, ...], now: float) -> tuple[ApiKey, ...]:
            if any(each.name == name and each.is_valid(now) for each in keys):
                raise InvalidKey(f"a key {name!r} exists already: revoke it first, or choose another name")
            return (*keys, key)

        self._update(add)
        return key, token

    def revoke(self, name: str, by: str | None = None) -> ApiKey:
        """Revoke a key by name or id. Keys stay required, even if it was the last one.

        Raises:
            UnknownKey: no key has that name or id, or it is revoked already.
        """
        revoked: list[ApiKey] = []

        def mark(keys: tuple[ApiKey, ...], now: float) -> tuple[ApiKey, ...]:
            named = [each for each in keys if each.revoked_at is None and name in (each.name, each.id)]
            if not named:
                raise UnknownKey(name)
            found = next((each for each in named if each.is_valid(now)), named[0])
            revoked[:] = [found.model_copy(update={"revoked_at": now, "revoked_by": by})]
            return tuple(revoked[0] if each is found else each for each in keys)

        self._update(mark)
        return revoked[0]

    def _update(self, decide: "_Decision") -> None:
        for _ in range(ATTEMPTS):
            raw, before = self._read()
            now = self.clock.now()
            keys = decide(before.keys if before else (), now)
            revoked = [each for each in keys if each.revoked_at is not None]
            forgotten = set(sorted(each.revoked_at or 0.0 for each in revoked)[:-REVOKED_KEPT])
            kept = tuple(each for each in keys if each.revoked_at not in forgotten)
            # always later than the stored one, whatever this machine's clock says
            after = ApiKeys(changed_at=max(now, before.changed_at + 1e-3 if before else 0.0), keys=kept)
            arguments: list[bytes | str] = [raw, after.model_dump_json(), CHANGES, "{}"]
            with translate_redis_errors():
                if self._change_document([API_KEYS], arguments) == b"done":
                    return
        raise StoreUnavailable("too many concurrent changes of the API keys: try again")

    def _read(self) -> tuple[bytes, ApiKeys | None]:
        raw = self.clock.get(self._client, API_KEYS)
        if raw is None:
            return b"", None
        try:
            return raw, ApiKeys.model_validate_json(raw)
        except ValidationError:
            raise InvalidKey(
                f"{API_KEYS} in Redis is unreadable: was it written by another program or a newer version?"
            ) from None


class _Decision(Protocol):
    """Computes the new keys from the current ones. It may be called repeatedly."""

    def __call__(self, keys: tuple[ApiKey, ...], now: float) -> tuple[ApiKey, ...]: ...


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
