"""What the Dockerfile says, instruction by instruction."""

import json
import re
import shlex

from tests.docker.conftest import DOCKER


def instructions() -> list[tuple[str, str]]:
    """(word, argument) of every instruction, with continued lines joined."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines()]
    return [(word, argument.strip()) for word, argument in found]


def variables() -> dict[str, str]:
    """The environment of the image."""
    found: dict[str, str] = {}
    stage = ""
    for word, argument in instructions():
        if word == "FROM":
            stage = argument.split()[-1]
        if word == "ENV" and stage == "runtime":
            found |= dict(each.split("=", 1) for each in shlex.split(argument))
    return found


def health_check() -> list[str]:
    """The command that tells whether the container is healthy."""
    (argument,) = [argument for word, argument in instructions() if word == "HEALTHCHECK"]
    command = json.loads(argument.split("CMD", 1)[1])
    assert isinstance(command, list)
    return [str(each) for each in command]
