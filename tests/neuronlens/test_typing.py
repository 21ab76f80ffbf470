"""Types as users see them: mypy, strict, on a page of their code."""

from pathlib import Path

from mypy import api

HERE = Path(__file__).parent


def test_types_are_what_a_caller_expects() -> None:
    """`typed.py` says of each call what it gives, and which calls are wrong: an error too few is one too."""
    options = ["--strict", "--no-incremental", "--config-file=", "--explicit-package-bases", "--follow-imports=silent"]
    out, err, status = api.run([*options, str(HERE / "typed.py")])
    assert status == 0, f"{out}{err}"
