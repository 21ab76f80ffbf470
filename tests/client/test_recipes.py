"""Every recipe of docs/recipes.md runs unchanged, except for the address, against a server with API keys."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.conftest import system_program
from tests.servers import KeyedServer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text("utf-8")
RECIPES = [
    (language, PAGE.count("\n", 0, PAGE.index(code)), code)
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
"""Language, line and code of each block."""
OTHER_PACKAGES = ("langchain_core", "haystack")
"""Packages of two recipes that are no requirements; the page names the versions that the recipes were tried with."""
RUN_ALL = """
import json, sys
for line, code in json.load(sys.stdin):
    print(f"recipe at line {line}:")
    exec(compile(code, f"docs/recipes.md, block at line {line}", "exec"), {"__name__": "__main__"})
"""


def of_language(language: str) -> list[object]:
    return [pytest.param(code, id=f"{language}-{line}") for each, line, code in RECIPES if each == language]


def needs_other_packages(code: str) -> bool:
    return any(f"from {name}" in code for name in OTHER_PACKAGES)


def run(command: list[str], code: str, keyed_server: KeyedServer) -> "subprocess.CompletedProcess[str]":
    running, tokens = keyed_server
    assert "http://127.0.0.1:8000" in code
    return subprocess.run(
        command,
        input=code.replace("http://127.0.0.1:8000", running.url),
        env={**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python"), "NEURONLENS_API_KEY": tokens["admin"]},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_page_has_recipes_of_three_languages_only() -> None:
    languages = [language for language, _, _ in RECIPES]
    assert set(languages) == {"sh", "python", "js"}
    assert min(languages.count(language) for language in languages) >= 2
    others = [code for language, _, code in RECIPES if language == "python" and needs_other_packages(code)]
    assert len(others) == len(OTHER_PACKAGES)
    for code in others:
        compile(code, "recipe", "exec")
    for name in ("langchain-core", "haystack-ai"):
        assert re.search(rf"Tried with {name} \d+\.\d+\.\d+:", PAGE)


def test_python_recipes_run(keyed_server: KeyedServer) -> None:
    """All in one process, because its start takes longer than the recipes."""
    recipes = [
        (line, code) for language, line, code in RECIPES if language == "python" and not needs_other_packages(code)
    ]
    ended = run([sys.executable, "-W", "error", "-c", RUN_ALL], json.dumps(recipes), keyed_server)
    assert (ended.returncode, ended.stderr) == (0, "")
    printed = re.split(r"^recipe at line \d+:\n", ended.stdout, flags=re.MULTILINE)[1:]
    assert len(printed) == len(recipes) > 0
    assert all(printed)


@pytest.mark.system
@pytest.mark.parametrize("code", of_language("sh"))
def test_shell_recipes_run(code: str, keyed_server: KeyedServer) -> None:
    system_program("curl")
    ended = run(["bash", "-euo", "pipefail", "-s"], code.replace("--max-time 2 ", "--max-time 10 "), keyed_server)
    if "--max-time" in code:  # the stream of events never ends by itself
        assert ended.returncode == 28
        assert "event: live\n" in ended.stdout
    else:
        assert (ended.returncode, ended.stderr) == (0, "")
        assert '"generation":' in ended.stdout
        assert '"code"' not in ended.stdout


@pytest.mark.system
@pytest.mark.parametrize("code", of_language("js"))
def test_javascript_recipes_run(code: str, keyed_server: KeyedServer) -> None:
    ended = run([system_program("node"), "--input-type=module"], code, keyed_server)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout
