"""`make test-stress`: the fast tier, again and again, beside processes that keep the cores busy.

A test that needs a quiet machine, or luck, fails here sooner or later. One line per run says what it gave; a failed
run names its tests, and its whole output is kept.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def spin() -> None:
    """Keep one core busy."""
    while True:
        pass


def run_once(arguments: list[str], log: Path) -> tuple[int, str, list[str]]:
    """Run pytest with its output in a file: the exit code, the summary line, and the tests that did not pass."""
    with log.open("w") as stream:
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, stdout=stream, stderr=stream
        ).returncode
    lines = log.read_text(errors="replace").splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no summary")
    return code, summary.strip("= "), [line for line in lines if line.startswith(("FAILED ", "ERROR "))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-stress", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside the tests (default 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "stress", help="directory of the runs' output")
    options, arguments = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(options.busy)]
    for each in busy:
        each.start()
    print(f"{options.runs} runs beside {options.busy} busy loops, on {os.cpu_count()} cores", flush=True)
    failed = 0
    for number in range(1, options.runs + 1):
        began = time.monotonic()
        code, summary, wrong = run_once(arguments, options.out / f"{number}.log")
        failed += code != 0
        took = f"{time.monotonic() - began:.0f} s"
        print(f"run {number:2}: {'FAILED' if code else 'passed'} in {took}: {summary}", *wrong, sep="\n  ", flush=True)
    for each in busy:
        each.terminate()
    print(f"{options.runs - failed} of {options.runs} runs passed; their output is in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
