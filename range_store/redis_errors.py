"""Turns the errors of redis-py into StoreUnavailable with a message that says what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from range_store.errors import StoreUnavailable

_REFUSALS = {
    "OOM": "Redis is out of memory and refuses to write: raise its maxmemory or remove range sets",
    "READONLY": "this Redis is a read-only replica: point NEURONLENS_REDIS_URL at the primary",
    "MISCONF": "Redis refuses to write because it cannot save to disk: see its log",
    "NOAUTH": "Redis requires a password: add it to NEURONLENS_REDIS_URL",
    "WRONGPASS": "Redis refuses the user name or password in NEURONLENS_REDIS_URL",
    "NOPERM": "this Redis user may not run what the store needs: see its ACL",
    "LOADING": "Redis is still loading its data: try again in a moment",
    "BUSY": "Redis is busy with a long script: try again in a moment",
    "WRONGTYPE": "a key of NeuronLens holds something else: is this Redis shared with another application?",
}


@contextmanager
def translate_redis_errors() -> Iterator[None]:
    """Raise every error of Redis inside the block as StoreUnavailable."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        code, message = _diagnose(error)
        raise StoreUnavailable(message, code) from error


def describe_redis_error(error: Exception) -> str:
    """Describe an error of Redis or of the connection to it in one sentence, which never contains a password."""
    return _diagnose(error)[1]


def _diagnose(error: Exception) -> tuple[str | None, str]:
    """Return Redis's error code, or None if it did not answer, and a sentence."""
    text = " ".join(str(error).split())
    code = _code(error, text)
    if code in _REFUSALS:
        return code, _REFUSALS[code]
    if text.startswith("the private Redis"):  # raised by `range_store.embedded`
        return None, text
    match error:
        case redis.TimeoutError():
            return None, f"Redis does not answer in time ({text}): is it overloaded or cut off?"
        case redis.ConnectionError() | OSError():
            return None, f"Redis cannot be reached ({text}): is it running?"
        case _:
            return "ERR", f"Redis refused: {text}"


def _code(error: Exception, text: str) -> str | None:
    for code in _REFUSALS:
        if re.search(rf"(^|: -?){code}\b", text.upper()):  # at the start, or in a script's error
            return code
    if "The user executing the script can't run this" in text or "ACL failure in script" in text:
        return "NOPERM"
    match error:
        case redis.ReadOnlyError():
            return "READONLY"
        case redis.OutOfMemoryError():
            return "OOM"
        case redis.BusyLoadingError():
            return "LOADING"
        case redis.AuthenticationError():
            return "NOAUTH" if "required" in text.lower() else "WRONGPASS"
        case redis.exceptions.NoPermissionError():
            return "NOPERM"
        case _:
            return None
