"""Every code block of docs/dropin.md runs unchanged, except for the address of the server."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docker.conftest import system_program
from tests.servers import LABELS, RunningServer, with_ranges
from workers.fitting.fit import FitResult

PAGE = (Path(__file__).parents[3] / "docs/dropin.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON, SHELL = ([code for each, code in BLOCKS if each == language] for language in ("python", "sh"))


@pytest.fixture(scope="module")
def demo(start_module_server: Callable[..., RunningServer], fitted: FitResult) -> RunningServer:
    """A server whose model has the name that the page uses."""
    return with_ranges(start_module_server(name="demo-news"), fitted)


def test_the_page_has_python_and_shell_blocks_only() -> None:
    assert min(len(PYTHON), len(SHELL)) >= 3
    assert len(BLOCKS) == len(PYTHON) + len(SHELL)


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(
    demo: RunningServer, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEURONLENS_API_KEY", raising=False)
    exec(compile(with_address(demo, code), "block", "exec"), {})
    printed = capsys.readouterr().out
    assert any(label in printed for label in LABELS), printed


@pytest.mark.system
@pytest.mark.parametrize("code", SHELL)
def test_shell_blocks_run(demo: RunningServer, code: str) -> None:
    system_program("curl")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-s"],
        input=with_address(demo, code),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '"error"' not in done.stdout
    assert any(f'"{label}"' in done.stdout for label in LABELS)


def with_address(running: RunningServer, code: str) -> str:
    """A block with the address of the server in place of the documented one."""
    assert "127.0.0.1:8000" in code
    return code.replace("127.0.0.1:8000", running.url.removeprefix("http://"))
