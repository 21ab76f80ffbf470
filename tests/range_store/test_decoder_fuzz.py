"""Damaged bytes are refused with the documented error, within bounds of memory and time (`decoder_fuzz` says how)."""

import json
import subprocess
import sys

import pytest

KINDS = ("archive", "inspect", "keys", "live", "meta", "serve")
LONG = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("inputs", [2_000, pytest.param(100_000, marks=LONG)])
def test_what_is_damaged_is_refused_or_is_itself(pytestconfig: pytest.Config, inputs: int) -> None:
    """In a process of its own, whose memory is limited; a hang is ended by the test's own limit."""
    command = [sys.executable, "-m", "tests.range_store.decoder_fuzz", "--inputs", str(inputs)]
    command += ["--seed", str(pytestconfig.getoption("--seed"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert done.returncode == 0, done.stderr[-20_000:]
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) >= inputs
    for kind in KINDS:
        assert outcomes[f"{kind} refused"] > inputs / 20
        assert outcomes[f"{kind} accepted"] > 1, "damage that changes nothing of what is said"


def test_a_decoder_that_lets_damage_through_would_be_found(pytestconfig: pytest.Config) -> None:
    """The same with parts taken for what they look like, however they are written."""
    program = (
        "from range_store import codec; from tests.range_store import decoder_fuzz as target; "
        "codec._checked = lambda data, meta, part: codec.from_safetensors(data); target.fuzz(2000, 5)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
