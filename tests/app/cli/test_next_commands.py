"""Commands that are printed run as they stand."""

import shlex
from pathlib import Path

from app.cli.terminal import command


def test_options_are_quoted_and_those_not_given_left_out() -> None:
    given = {"name": "it's $new", "out": Path("my data/x"), "split": None, "plain": False, "force": True, "max_rows": 0}
    assert shlex.split(command("ranges", "show", "ab", **given)) == [
        *[
            "neuronlens",
            "ranges",
            "show",
            "ab",
            "--name",
            "it's $new",
            "--out",
            "my data/x",
            "--force",
            "--max-rows",
            "0",
        ]
    ]


def test_a_value_that_looks_like_an_option_is_a_value() -> None:
    assert command("fit", name="-x") == "neuronlens fit --name=-x"


def test_passwords_are_not_printed() -> None:
    for given, printed in (
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:secret@host", "rediss://user@host"),  # pragma: allowlist secret
        ("redis://user@host", "redis://user@host"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ):
        assert command("fit", redis_url=given) == f"neuronlens fit --redis-url {printed}"
