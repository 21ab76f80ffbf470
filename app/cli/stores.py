"""The store as commands see it: which Redis, whose range sets, and on whose behalf."""

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from app.choices import ModelChoice
from app.cli.exits import CommandError
from app.errors import CONFLICT, USAGE

if TYPE_CHECKING:
    from app.settings import Settings
    from range_store.storage.store import RangeStore


def settings_with(**overrides: Any) -> "Settings":
    """The settings of the environment, with the options that were given in their place.

    Raises:
        CommandError: settings are unusable; names each by its option or variable.
    """
    from pydantic import ValidationError

    from app.settings import Settings

    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        problems: dict[str, str] = {}  # one of each setting: a union tells of every member
        for each in error.errors():
            name = str(each["loc"][0]) if each["loc"] else ""
            option = f"--{name.replace('_', '-')}: " if name in given else f"NEURONLENS_{name.upper()}: "
            problems.setdefault(name, (option if name else "") + each["msg"].removeprefix("Value error, "))
        raise CommandError("; ".join(problems.values()), USAGE) from None


@contextmanager
def store_of(settings: "Settings", name: str | None, *, publishes: bool = False) -> Iterator["RangeStore"]:
    """The store of one served model: of that name, else of the settings', else of the only one that has range sets.

    Args:
        publishes: give Redis the time that a large range set takes to be written.

    Raises:
        CommandError: no name was given, and there is not exactly one model with range sets.
        StoreUnavailable: Redis cannot be reached.
    """
    from range_store.embedded.connection import ANSWER_TIMEOUT, TRANSFER_TIMEOUT, connect
    from range_store.storage.store import RangeStore

    timeout = TRANSFER_TIMEOUT if publishes else ANSWER_TIMEOUT
    with connect(**settings.redis, timeout=timeout) as client:
        yield RangeStore(client, name or _named(settings) or _only_model(client))


@contextmanager
def stores_of(settings: "Settings", name: str | None) -> Iterator[dict[str, "RangeStore"]]:
    """The store of the model of that name, else of the settings', else of each that has range sets, by name.

    Raises:
        CommandError: no model has range sets.
        StoreUnavailable: Redis cannot be reached.
    """
    from range_store.embedded.connection import connect
    from range_store.storage.store import RangeStore

    with connect(**settings.redis) as client:
        chosen = name or _named(settings)
        yield {each: RangeStore(client, each) for each in ([chosen] if chosen else _models(client))}


def _named(settings: "Settings") -> str | None:
    return ModelChoice.of(settings).served_name if settings.model else settings.name


def _only_model(client: Any) -> str:
    found = _models(client)
    if len(found) > 1:
        raise CommandError(f"several models have range sets: choose one with --name: {', '.join(found)}", USAGE)
    return found[0]


def _models(client: Any) -> list[str]:
    """Names of the models that have range sets. Raises CommandError if there are none."""
    from range_store.redis_errors import translate_redis_errors
    from range_store.storage.keys import ModelKeys

    prefix = ModelKeys("").range_sets
    with translate_redis_errors():
        found = sorted(key.decode().removeprefix(prefix) for key in client.scan_iter(f"{prefix}*"))
    if not found:
        raise CommandError(
            "no model has range sets here: fit one with `neuronlens fit`, or name it with --name", CONFLICT
        )
    return found


def operator() -> str:
    """Who the audit says did it."""
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # a user id without a name, as containers have
        return "cli"
