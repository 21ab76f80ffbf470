"""`make audit` finds secrets and vulnerable packages, and says if it could not look."""

import json
import runpy
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    """The functions of the script."""
    return runpy.run_path(str(ROOT / ".ci" / "audit.py"))


def test_tracked_secret_is_found(audit: dict[str, Any], tmp_path: Path) -> None:
    key = f"nl_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"
    planted = {
        "app/settings.py": f'API_KEY = "{key}"\n',
        "docs/notes.md": f"# Notes\n\ncurl -H 'X-API-Key: {key}'\n",
        "docker/cloud.env": "AWS_ACCESS_KEY_ID=AKIA" + "Z7V2QFH4LWXN3RTB" + "\n",
        "docker/redis.pem": "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIE\n",
        "app/store.py": 'password = "' + "tr0ub4dor" + '-and-3"\n',
        "tests/test_store.py": 'REPLY = {"hash": "' + secrets.token_hex(32) + '"}\n',
    }
    harmless = {
        "README.md": (ROOT / "README.md").read_text("utf-8"),
        "tests/conftest.py": 'PASSWORD = "a-password"\nTOKEN = "nl_0123abcd_' + "x" * 43 + '"\n',
        "app/ids.py": f'RANGE_SET = "{secrets.token_hex(10)}"\n',
    }
    for name, text in (planted | harmless).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "untracked.env").write_text(planted["docker/cloud.env"])
    found = audit["secrets"](tmp_path)
    assert {place.split(":")[0] for place in found} == set(planted)
    assert "docs/notes.md:3: NeuronLens key" in found
    assert not any(key in place or "tr0ub4dor" in place for place in found), "a finding does not repeat the secret"


def test_report_without_audited_packages_is_not_a_success(audit: dict[str, Any]) -> None:
    """pip-audit exits with 0 and "No known vulnerabilities found" if the advisory service does not answer."""
    unknown = {
        "dependencies": [{"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}]
    }
    assert audit["verdict"](unknown) == ([], ["torch"], 0)
    good = {
        "dependencies": [{"name": "jinja2", "version": "3.1.6", "vulns": []}, *unknown["dependencies"]],
        "fixes": [],
    }
    assert audit["verdict"](good) == ([], ["torch"], 1)
    known = {"id": "PYSEC-2021-66", "fix_versions": ["2.11.3"], "aliases": [], "description": ""}
    bad = {"dependencies": [{"name": "jinja2", "version": "2.11.2", "vulns": [known]}]}
    assert audit["verdict"](bad) == (["jinja2 2.11.2: PYSEC-2021-66 (fixed in 2.11.3)"], [], 1)


@pytest.mark.parametrize(
    ("prints", "code", "says"),
    [
        ('{"dependencies": [{"name": "torch", "skip_reason": "not found"}]}', 0, "NOT AUDITED: no advisory service"),
        ("", 0, "NOT AUDITED: no advisory service"),
        ('{"dependencies": [{"name": "torch", "version": "2.13.0", "vulns": []}]}', 0, "1 packages audited, 0 known"),
        (
            json.dumps({"dependencies": [{"name": "t", "version": "1", "vulns": [{"id": "X", "fix_versions": []}]}]}),
            1,
            "t 1: X (fixed in no version yet)",
        ),
    ],
    ids=["no package known", "unreachable", "good", "vulnerable"],
)
def test_missing_audit_is_reported_and_a_vulnerability_fails(
    audit: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], prints: str, code: int, says: str
) -> None:
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n")
    stand_in.chmod(0o755)
    audit["advisories"].__globals__["PIP_AUDIT"] = stand_in
    assert audit["advisories"]() == code
    assert says in capsys.readouterr().out
