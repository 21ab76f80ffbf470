"""What Redis's errors mean to whoever asked: one sentence each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from range_store.errors import StoreUnavailable

_REFUSALS = (
    ("OOM", "Redis is out of memory and refuses to write: raise its maxmemory or remove range sets"),
    ("READONLY", "this Redis is a read-only replica: point NEURONLENS_REDIS_URL at the primary"),
    ("MISCONF", "Redis refuses to write because it cannot save to disk: see its log"),
    ("NOAUTH", "Redis wants a password: put it into NEURONLENS_REDIS_URL"),
    ("WRONGPASS", "Redis refuses the user name or password in NEURONLENS_REDIS_URL"),
    ("NOPERM", "this Redis user may not run what the store needs: see its ACL"),
    ("LOADING", "Redis is still loading its data: try again in a moment"),
    ("BUSY", "Redis is busy with a long script: try again in a moment"),
    ("WRONGTYPE", "a key of NeuronLens holds something else: is this Redis shared with another application?"),
)


@contextmanager
def translate_redis_errors() -> Iterator[None]:
    """Turns every error of Redis inside the block into StoreUnavailable with a sentence that says what to do."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise StoreUnavailable(describe_redis_error(error)) from error


def describe_redis_error(error: Exception) -> str:
    """One sentence on an error of Redis or of the way to it. It never repeats a password."""
    text = " ".join(str(error).split())
    for code, sentence in _REFUSALS:
        if re.search(rf"(^|: -?){code}\b", text.upper()):  # in front, or in what a script was told
            return sentence
    if "The user executing the script can't run this" in text or "ACL failure in script" in text:
        return dict(_REFUSALS)["NOPERM"]
    if text.startswith("the private Redis"):  # it was said already
        return text
    match error:
        case redis.ReadOnlyError():
            return dict(_REFUSALS)["READONLY"]
        case redis.OutOfMemoryError():
            return dict(_REFUSALS)["OOM"]
        case redis.BusyLoadingError():
            return dict(_REFUSALS)["LOADING"]
        case redis.AuthenticationError() if "required" in text.lower():
            return dict(_REFUSALS)["NOAUTH"]
        case redis.AuthenticationError():
            return dict(_REFUSALS)["WRONGPASS"]
        case redis.exceptions.NoPermissionError():
            return dict(_REFUSALS)["NOPERM"]
        case redis.TimeoutError():
            return f"Redis does not answer in time ({text}): is it overloaded or cut off?"
        case redis.ConnectionError() | OSError():
            return f"Redis cannot be reached ({text}): is it running?"
        case _:
            return f"Redis refused: {text}"
