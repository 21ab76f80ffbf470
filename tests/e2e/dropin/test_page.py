"""Every block of docs/dropin.md runs as it stands, against a real server that is called as the demo's."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docker.conftest import system_program
from tests.servers import LABELS, RunningServer, with_ranges
from workers.fitting.fit import Fitted

PAGE = (Path(__file__).parents[3] / "docs/dropin.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON, SHELL = ([code for each, code in BLOCKS if each == language] for language in ("python", "sh"))


@pytest.fixture
def demo(start_server: Callable[..., RunningServer], fitted: Fitted) -> RunningServer:
    return with_ranges(start_server(name="demo-news"), fitted)


def test_the_page_has_blocks_of_two_kinds() -> None:
    assert min(len(PYTHON), len(SHELL)) >= 3
    assert len(BLOCKS) == len(PYTHON) + len(SHELL)


@pytest.mark.parametrize("code", PYTHON)
def test_python(
    demo: RunningServer, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEURONLENS_API_KEY", raising=False)
    exec(compile(at(demo, code), "block", "exec"), {})
    printed = capsys.readouterr().out
    assert any(label in printed for label in LABELS), printed


@pytest.mark.system
@pytest.mark.parametrize("code", SHELL)
def test_shell(demo: RunningServer, code: str) -> None:
    system_program("curl")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-s"],
        input=at(demo, code),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '"error"' not in done.stdout
    assert any(f'"{label}"' in done.stdout for label in LABELS)


def at(running: RunningServer, code: str) -> str:
    """A block, for a server at another address than the page says."""
    assert "127.0.0.1:8000" in code
    return code.replace("127.0.0.1:8000", running.url.removeprefix("http://"))
