"""The types of the client as mypy in strict mode sees them."""

from pathlib import Path

import pytest
from mypy import api

HERE = Path(__file__).parent


@pytest.mark.full
def test_mypy_infers_the_documented_types() -> None:
    """`typed.py` declares the type of each call and which calls are errors: a missing error is an error too."""
    options = ["--strict", "--no-incremental", "--config-file=", "--explicit-package-bases", "--follow-imports=silent"]
    out, err, status = api.run([*options, str(HERE / "typed.py")])
    assert status == 0, f"{out}{err}"
