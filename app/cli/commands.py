"""Commands to type next, as a shell takes them."""

import shlex
from urllib.parse import urlsplit, urlunsplit


def command(*words: str, **options: object) -> str:
    """A `neuronlens` command that can be pasted. Options that are None or False are left out; so is a password in an
    address, which then has to be typed.
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
