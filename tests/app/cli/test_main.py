"""The command as a whole: help, version, exit codes; and that what needs no model loads no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import app.cli
from app.cli.exits import MEANINGS
from tests.app.cli.conftest import Cli, Prepared

ROOT = Path(__file__).parents[3]
COMMANDS = [
    [],
    ["demo"],
    ["serve"],
    ["fit"],
    ["evaluate"],
    ["train"],
    ["ranges"],
    *(["ranges", command] for command in ("list", "show", "activate", "export", "import", "remove")),
    ["fleet"],
    *(["fleet", command] for command in ("list", "down")),
    ["erase"],
    *(["erase", command] for command in ("on", "off", "list")),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_says_what_exit_codes_mean(cli: Cli, command: list[str]) -> None:
    ended = cli(*command, "--help")
    assert ended.exit_code == 0
    told = " ".join(ended.stdout.split())
    for code, meaning in MEANINGS.items():
        assert f"{code} {meaning}" in told


def test_nothing_asked_for_is_help(cli: Cli) -> None:
    for command in ([], ["ranges"], ["erase"]):
        ended = app.cli.run(command)
        assert ended == 2


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("neuronlens ")


@pytest.mark.parametrize(
    "arguments", [["nope"], ["fit"], ["erase", "on"], ["fit", "--nope"], ["train", "--epochs", "x"], ["ranges", "show"]]
)
def test_wrong_usage_is_exit_2_and_names_the_help(cli: Cli, arguments: list[str]) -> None:
    ended = cli(*arguments)
    assert ended.exit_code == 2
    assert "--help`" in ended.stderr


def test_a_setting_that_is_unusable_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_PORT", "many")
    ended = cli("erase", "list")
    assert ended.exit_code == 2
    assert "port" in ended.stderr


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = typer.Typer()

    @broken.command()
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app.cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        app.cli.run([])


WITHOUT_TORCH = """
import sys
from app.cli import run
for arguments in json.loads(sys.argv[1]):
    assert run(arguments) == 0, arguments
loaded = {"torch", "transformers", "datasets", "fastapi"} & set(sys.modules)
assert not loaded, loaded
"""


def test_what_needs_no_model_loads_no_torch(prepared: Prepared, tmp_path: Path) -> None:
    options = list(prepared.options)
    commands = [
        ["--help"],
        ["fit", "--help"],
        ["ranges", "list", *options],
        ["ranges", "export", prepared.whole, str(tmp_path / "x.safetensors"), *options],
        ["erase", "on", "World", *options],
        ["erase", "off", "World", *options],
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "import json\n" + WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_the_installed_command_prints_pure_json_in_any_encoding(prepared: Prepared) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:backslashreplace"}
    command = [Path(sys.executable).parent / "neuronlens", "ranges", "list", "--json", *prepared.options]
    ended = subprocess.run(command, capture_output=True, env=environment)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)[1]["id"] == prepared.whole


def test_several_models_in_one_process_are_refused_with_what_would_serve_them(cli: Cli) -> None:
    ended = cli("serve", "--model", "models/news", "--also", "sport=models/sport")
    assert (ended.exit_code, "needs --ray" in ended.stderr) == (2, True)
    ended = cli("serve", "--model", "models/news", "--also", "sport=a", "--also", "sport=b")
    assert (ended.exit_code, "two models have the name 'sport'" in ended.stderr) == (2, True)


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # importing it fails
import app.wiring
from app.cli import run
sys.exit(run(["fit", "--model", "m", "--data", "d.jsonl", "--data-dir", sys.argv[1], *sys.argv[2:]]))
"""


def test_only_a_command_on_a_cluster_needs_ray(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(tmp_path), "--ray"], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: Ray is not installed: pip install 'neuronlens[ray]'"


def test_actors_are_of_a_cluster(cli: Cli) -> None:
    ended = cli("fit", "--model", "m", "--data", "d.jsonl", "--actors", 2)
    assert ended.exit_code == 2
    assert "add --ray" in ended.stderr
