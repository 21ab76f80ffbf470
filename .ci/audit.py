"""`make audit`: secrets in what git tracks, and known vulnerabilities of what `constraints.txt` pins.

The first needs no network. The second asks the advisory services that pip-audit knows. pip-audit calls a package that a
service does not answer for "skipped" and ends well, so that without a network it finds "no known vulnerabilities" in
nothing at all: here that is said for what it is.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PIP_AUDIT = ROOT / "build" / "audit" / "bin" / "pip-audit"
SERVICES = ("pypi", "osv")
IDS = r"^[0-9a-f]{20}$"
"""Range sets', which look like secrets. For others that do, the line says `pragma: allowlist secret`."""
UNCHECKED = r"\.min\.js$|/version_before/stored\.json$"
"""Minified code, and hashes and arrays of a test fixture: some string of them always looks like a secret."""
OUR_TOKEN = re.compile(r"\bnl_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")
FILLED = re.compile(r"nl_[0-9a-f]{8}_(.)\1{42}")
"""A token that is none: one character over and over."""


def secrets(root: Path) -> list[str]:
    """Places of secrets in the tracked files below `root`; never the secrets themselves."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    files = [name for name in listed.split("\0") if name and (root / name).is_file()]
    tests = [name for name in files if name.startswith("tests/")]
    places = _detected(root, [name for name in files if name not in tests])
    # tests make passwords up, and call them so: there the form of a secret counts, not the name it is given
    places += _detected(root, tests, "--disable-plugin", "KeywordDetector")
    for name in files:
        lines = (root / name).read_text("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            if any(not FILLED.match(each[0]) for each in OUR_TOKEN.finditer(line)):
                places.append(f"{name}:{number}: NeuronLens key")
    return sorted(places)


def _detected(root: Path, files: list[str], *options: str) -> list[str]:
    hook = Path(sys.executable).parent / "detect-secrets-hook"
    excluded = ["--exclude-secrets", IDS, "--exclude-files", UNCHECKED]
    command = [str(hook), "--no-verify", "--json", *excluded, *options, *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)["results"] if done.returncode else {}
    return [f"{name}:{each['line_number']}: {each['type']}" for name, of in found.items() for each in of]


def verdict(report: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """(vulnerabilities, packages that were not audited, number of those that were) of a report of pip-audit."""
    vulnerable, skipped, audited = [], [], 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped.append(package["name"])
            continue
        audited += 1
        for each in package["vulns"]:
            fixed = ", ".join(each["fix_versions"]) or "no version yet"
            vulnerable.append(f"{package['name']} {package['version']}: {each['id']} (fixed in {fixed})")
    return vulnerable, skipped, audited


def advisories() -> int:
    """Exit code: 0 where nothing is known against any pin, or nobody could be asked; 1 where something is."""
    for service in SERVICES:
        command = [PIP_AUDIT, "--vulnerability-service", service, "--requirement", ROOT / "constraints.txt"]
        command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        try:
            vulnerable, skipped, audited = verdict(json.loads(done.stdout))
        except ValueError:
            why = (done.stderr.strip().splitlines() or ["no output"])[-1]
            print(f"{service}: no answer ({why[:200]})")
            continue
        if not audited:
            print(f"{service}: no answer for any of {len(skipped)} packages")
            continue
        print(f"{service}: {audited} packages audited, {len(vulnerable)} known vulnerabilities")
        if skipped:
            print(f"NOT AUDITED, unknown to {service}: {', '.join(skipped)}")
        print("\n".join(vulnerable))
        return 1 if vulnerable else 0
    print("=" * 100)
    print("NOT AUDITED: no advisory service can be reached from here, so no dependency was checked.")
    print("`make audit` checks them where one of pip-audit's services can be reached.")
    print("=" * 100)
    return 0


def main() -> int:
    """Exit code: 1 where there is a secret or a vulnerability."""
    found = secrets(ROOT)
    print("\n".join([*found, f"{len(found)} secrets in what git tracks"]))
    return max(1 if found else 0, advisories())


if __name__ == "__main__":
    sys.exit(main())
