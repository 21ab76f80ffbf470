"""`make mutants`: the share of mutants of the core that its own tests kill; see `mutants.md` beside this file."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.stats import status_by_exit_code

from range_store.embedded.server import EmbeddedServer
from range_store.errors import StoreUnavailable

ROOT = Path(__file__).parents[1]
LEAST_SHARE = 0.85
KILLED = ("killed", "timeout")
"""A mutant that makes a test hang is noticed like one that makes it fail."""
NO_VERDICT = 255
"""Exit status where pytest itself could not run; mutmut counts it among the timeouts."""


def run_mutants() -> int:
    """Generate and test all mutants anew; mutmut would keep earlier verdicts although a test has changed."""
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    command = [str(Path(sys.executable).with_name("mutmut")), "run"]
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **one_thread, "TMPDIR": scratch}).returncode
        end_servers(Path(scratch))
    return status


def end_servers(scratch: Path) -> None:
    """End the Redis servers of test processes that were killed for taking too long."""
    for pid_file in scratch.rglob("redis.pid"):
        server = EmbeddedServer(pid_file.parent)
        with suppress(StoreUnavailable), server.locked():
            if server.running():
                server.end()


def read_verdicts() -> dict[str, dict[str, str]]:
    """Verdict by mutant, by module."""
    verdicts = {}
    for module in config().only_mutate:
        data = SourceFileMutationData(path=module)
        data.load()
        verdicts[module] = {
            name: "not run" if code == NO_VERDICT else status_by_exit_code[code]
            for name, code in data.exit_code_by_key.items()
        }
    return verdicts


def share_killed(counts: Counter[str]) -> float:
    return sum(counts[each] for each in KILLED) / max(counts.total(), 1)


def row(module: str, *cells: object) -> str:
    return f"{module:30}" + "".join(f"{cell:>11}" for cell in cells)


def report(module: str, counts: Counter[str]) -> str:
    known = [counts[each] for each in ("killed", "timeout", "survived", "no tests")]
    return row(module, counts.total(), *known, counts.total() - sum(known), f"{share_killed(counts):.3f}")


def main() -> int:
    os.chdir(ROOT)
    if status := run_mutants():
        return status
    verdicts = read_verdicts()
    for by_name in verdicts.values():
        for name, verdict in by_name.items():
            if verdict not in KILLED:
                print(f"{verdict}: {name}")
    counts = {module: Counter(by_name.values()) for module, by_name in verdicts.items()}
    total = sum(counts.values(), Counter[str]())
    print(row("module", "mutants", "killed", "timed out", "survived", "no test", "other", "share"))
    for module in counts:
        print(report(module, counts[module]))
    print(report("all", total))
    if share_killed(total) < LEAST_SHARE:
        print(f"too few are killed: {share_killed(total):.3f}, expected {LEAST_SHARE} or more. See tests/mutants.md")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
