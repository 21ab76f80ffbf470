"""The table of errors against what raises, sends and reads them: routes, the Python client and the console."""

import json
import re
from pathlib import Path

import pytest

from app.errors import ERRORS, KINDS, STATUSES, ErrorKind
from neuronlens_client.errors import error_of

APP = Path(__file__).parents[2] / "app"


def test_codes_are_unique() -> None:
    assert len(KINDS) == len(ERRORS)


def test_every_error_without_a_class_is_raised_by_its_code() -> None:
    sources = "".join(file.read_text("utf-8") for file in APP.rglob("*.py") if file.name != "errors.py")
    assert [kind.code for kind in ERRORS if not kind.classes and f'"{kind.code}"' not in sources] == []


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.code)
def test_the_client_raises_the_class_of_the_table(kind: ErrorKind) -> None:
    problem = {"code": kind.code, "detail": "what is wrong", "status": kind.status}
    assert type(error_of(kind.status, {}, json.dumps(problem).encode())).__name__ == kind.client


def test_the_console_knows_only_errors_of_the_table() -> None:
    sources = "".join(file.read_text("utf-8") for file in (APP / "console").glob("*.js"))
    codes = set(re.findall(r"\.code [!=]== \"(\w+)\"", sources))
    assert codes
    assert codes <= set(KINDS)
    statuses = {int(status) for status in re.findall(r"(?:case|\.status [!=]==) (\d{3})\b", sources)}
    assert statuses
    assert statuses <= set(STATUSES)
