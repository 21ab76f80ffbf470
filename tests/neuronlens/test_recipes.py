"""Every recipe of docs/recipes.md runs as it stands, against a real server with keys."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from range_store.api_keys import KeyStore
from tests.docker.conftest import system_program
from tests.servers import RunningServer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text("utf-8")
BLOCKS = [
    pytest.param(language, code, id=f"{language}-{PAGE.count(chr(10), 0, PAGE.index(code))}")
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
OF_OTHERS = ("langchain_core", "haystack")
"""Packages of two recipes that nothing here requires; the page says with which versions they were tried."""


def blocks(language: str) -> list[object]:
    return [each for each in BLOCKS if each.values[0] == language]


def run(
    command: list[str], code: str, server_with_keys: tuple[RunningServer, dict[str, str], KeyStore]
) -> "subprocess.CompletedProcess[str]":
    running, tokens, _ = server_with_keys
    assert "http://127.0.0.1:8000" in code
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NEURONLENS_API_KEY": tokens["admin"]}
    return subprocess.run(
        command,
        input=code.replace("http://127.0.0.1:8000", running.url),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_page_has_recipes_of_each_kind_and_no_other() -> None:
    kinds = [each.values[0] for each in BLOCKS]
    assert set(kinds) == {"sh", "python", "js"}
    assert min(kinds.count(kind) for kind in kinds) >= 2
    of_others = [each for each in blocks("python") if is_of_others(each.values[1])]
    assert len(of_others) == len(OF_OTHERS)
    for name in ("langchain-core", "haystack-ai"):
        assert re.search(rf"Tried with {name} \d+\.\d+\.\d+:", PAGE)


def is_of_others(code: str) -> bool:
    return any(f"from {name}" in code for name in OF_OTHERS)


@pytest.mark.parametrize(("language", "code"), blocks("python"))
def test_python(language: str, code: str, server_with_keys: tuple[RunningServer, dict[str, str], KeyStore]) -> None:
    if is_of_others(code):
        compile(code, "recipe", "exec")
        return
    done = run([sys.executable, "-W", "error", "-"], code, server_with_keys)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    running, _, _ = server_with_keys
    assert running.http.get("/livez").status_code == 200


@pytest.mark.system
@pytest.mark.parametrize(("language", "code"), blocks("sh"))
def test_shell(language: str, code: str, server_with_keys: tuple[RunningServer, dict[str, str], KeyStore]) -> None:
    system_program("curl")
    code = code.replace("--max-time 2 ", "--max-time 10 ")  # a busy machine may need more to begin
    done = run(["bash", "-euo", "pipefail", "-s"], code, server_with_keys)
    if "--max-time" in code:  # a stream never ends by itself
        assert done.returncode == 28
        assert "event: live\n" in done.stdout
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert '"generation":' in done.stdout
        assert '"code"' not in done.stdout


@pytest.mark.system
@pytest.mark.parametrize(("language", "code"), blocks("js"))
def test_javascript(language: str, code: str, server_with_keys: tuple[RunningServer, dict[str, str], KeyStore]) -> None:
    done = run([system_program("node"), "--input-type=module"], code, server_with_keys)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
