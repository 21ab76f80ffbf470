"""The rules of docs/architecture.md that the import contracts in pyproject.toml cannot check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("app", "workers", "range_store")
MOST_MODULES = 15
MOST_LINES = 400
LONG = {"app/schemas/replies.py": "the replies of /v1, which refer to each other; a reader looks them up by name"}
"""Files of more than `MOST_LINES` lines, each with the reason."""


def modules() -> list[Path]:
    """Every module of the service."""
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_no_folder_has_too_many_modules() -> None:
    folders: dict[Path, int] = {}
    for path in modules():
        if path.name != "__init__.py":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_MODULES} == {}


def test_long_files_are_listed_with_a_reason() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules()}
    assert {name for name, lines in lengths.items() if lines > MOST_LINES} == set(LONG)


def test_every_folder_is_described() -> None:
    page = PAGE.read_text("utf-8")
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).glob("*/*.py")}:
            assert f"`{folder.name}/`" in page, folder


def test_every_guarantee_names_tests_that_exist() -> None:
    page = PAGE.read_text("utf-8")
    table = page[page.index("## Guarantees") :]
    rows = re.findall(r"^\| (\d+) \|.*\|$", table, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 12)]
    for row in re.findall(r"^\| \d+ \|.*\|$", table, re.MULTILINE):
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text("utf-8"))
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, test)


@pytest.mark.parametrize("word", ["DESIGN", "METHOD"])
def test_no_code_refers_to_documents_outside_the_repository(word: str) -> None:
    for path in modules():
        assert not re.search(rf"\b{word}\b(?! *=)", path.read_text("utf-8")), path
