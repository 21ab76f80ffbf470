"""Decoders refuse damaged bytes with their documented error, within limits of memory and time; see `decoder_fuzz`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("archive", "inspect", "keys", "live", "meta", "serve")
FULL = pytest.mark.full


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, because the fuzzer limits the memory of its process."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("inputs", [500, pytest.param(100_000, marks=FULL)])
def test_damaged_bytes_are_refused_or_decode_to_themselves(pytestconfig: pytest.Config, inputs: int) -> None:
    seed = str(pytestconfig.getoption("--seed"))
    done = run_python("-m", "tests.range_store.decoder_fuzz", "--inputs", str(inputs), "--seed", seed)
    assert done.returncode == 0, done.stderr[-20_000:]
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) >= inputs
    for kind in KINDS:
        assert outcomes[f"{kind} refused"] > inputs / 50, "every decoder met much damage"
        assert outcomes[f"{kind} accepted"] > 1, "some damage leaves the contents as they were"


def test_fuzzer_finds_a_decoder_that_accepts_damage() -> None:
    """A decoder that takes any arrays of a part, however they are written, fails within the inputs of the fast test."""
    done = run_python(
        "-c",
        "from range_store.storage import codec; from tests.range_store import decoder_fuzz; "
        "codec._verified = lambda data, meta, part: codec.from_safetensors(data); "
        "decoder_fuzz.fuzz(500, 5, shrink=False)",
    )
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
