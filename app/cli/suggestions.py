"""Commands that a user can run next, as a shell accepts them."""

import os
import shlex
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from app.cli.options import MODEL
from app.settings import Settings, default_data_dir


def command(*words: str, **options: object) -> str:
    """A `neuronlens` command.

    Options that are None or False are left out, and so is a password in a URL, which the user has to add.
    """
    parts = ["neuronlens", *words]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            written = _without_password(str(value)) if name.endswith("url") else str(value)
            parts += [f"{flag}={written}"] if written.startswith("-") else [flag, written]
    return shlex.join(parts)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    if not colon:
        return url
    return urlunsplit(parts._replace(netloc=f"{name}@{host}" if name else host))


def keys_create_command(settings: Settings) -> str:
    """The command that creates an API key in the settings' store."""
    return command("keys", "create", "NAME", scope="infer", **store_options(settings))


def fit_command(settings: Settings, source: str, name: str) -> str:
    """The command that fits and activates a range set for a served model."""
    loading = model_options(settings) if source == settings.model else {}
    loading["name"] = None if name == Path(source).name else name
    return command("fit", model=source, **loading, data="FILE", activate=True, **store_options(settings))


def model_options(settings: Settings) -> dict[str, object]:
    """The options with which another command loads the same model."""
    chosen = {name: getattr(settings, name) for name in MODEL}
    return {name: value for name, value in chosen.items() if value != Settings.model_fields[name].default}


def store_options(settings: Settings) -> dict[str, object]:
    """The options with which another command uses the same store, if it is not the default one."""
    if settings.redis_url is not None:
        same = settings.redis_url == os.environ.get("NEURONLENS_REDIS_URL")
        return {"redis_url": None if same else settings.redis_url}
    return {"data_dir": None if settings.data_dir == default_data_dir() else settings.data_dir}
