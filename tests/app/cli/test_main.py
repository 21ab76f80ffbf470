"""The command as a whole: help, version, exit codes, and what it imports."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import app.cli
from app.cli.exits import EPILOG, MEANINGS
from tests.app.cli.conftest import Cli, Prepared
from tests.processes import NEURONLENS, Running


def all_commands(command: Any) -> Iterator[Any]:
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from all_commands(each)


def test_the_help_of_every_command_explains_the_exit_codes(cli: Cli) -> None:
    found = list(all_commands(typer.main.get_command(app.cli.app)))
    assert len(found) > 20
    assert {command.name for command in found if command.epilog != EPILOG} == set()
    for command in ([], ["erase", "on"]):
        printed = " ".join(cli(*command, "--help").stdout.split())
        assert all(f"{code} {meaning}" in printed for code, meaning in MEANINGS.items())


def test_a_command_without_arguments_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["ranges"], ["erase"]):
        assert app.cli.run(command) == 2
        assert "Usage:" in capsys.readouterr().out


def test_version_is_printed(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("neuronlens ")


@pytest.mark.parametrize(
    "arguments", [["nope"], ["fit"], ["erase", "on"], ["fit", "--nope"], ["train", "--epochs", "x"], ["ranges", "show"]]
)
def test_wrong_usage_is_exit_2_and_refers_to_the_help(cli: Cli, arguments: list[str]) -> None:
    ended = cli(*arguments)
    assert ended.exit_code == 2
    assert "--help`" in ended.stderr


def test_an_invalid_setting_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_PORT", "many")
    ended = cli("erase", "list")
    assert ended.exit_code == 2
    assert "NEURONLENS_PORT" in ended.stderr


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = typer.Typer()

    @broken.command()
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app.cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        app.cli.run([])


WITHOUT_TORCH = """
import json
import sys
from app.cli import run
for arguments in json.loads(sys.argv[1]):
    assert run(arguments) == 0, arguments
loaded = {"torch", "transformers", "datasets", "fastapi"} & set(sys.modules)
assert not loaded, loaded
"""


def test_commands_without_a_model_do_not_import_torch(prepared: Prepared, tmp_path: Path) -> None:
    options = list(prepared.options)
    commands = [
        ["--help"],
        ["fit", "--help"],
        ["ranges", "list", *options],
        ["ranges", "export", prepared.whole, str(tmp_path / "x.safetensors"), *options],
        ["erase", "on", "World", *options],
        ["erase", "off", "World", *options],
    ]
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_installed_command_prints_pure_json_in_any_encoding(prepared: Prepared) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:backslashreplace"}
    command = [NEURONLENS, "ranges", "list", "--json", *prepared.options]
    ended = subprocess.run(command, capture_output=True, env=environment)
    assert ended.returncode == 0
    assert json.loads(ended.stdout)[1]["id"] == prepared.whole


def test_several_models_require_ray_and_different_names(cli: Cli) -> None:
    ended = cli("serve", "--model", "models/news", "--also", "sport=models/sport")
    assert (ended.exit_code, "needs --ray" in ended.stderr) == (2, True)
    ended = cli("serve", "--model", "models/news", "--also", "sport=a", "--also", "sport=b")
    assert (ended.exit_code, "two models have the name 'sport'" in ended.stderr) == (2, True)


WITHOUT_RAY = """
import sys
assert "ray" not in sys.modules
sys.modules["ray"] = None  # importing it fails
"""


def test_only_commands_on_a_cluster_import_ray(tmp_path: Path) -> None:
    fit = ["fit", "--model", tmp_path / "none", "--data", "d.jsonl", "--data-dir", tmp_path]
    on_cluster, alone = Running([*fit, "--ray"], code=WITHOUT_RAY), Running(fit, code=WITHOUT_RAY)
    assert on_cluster.end() == 2
    assert (
        on_cluster.stderr[-1].strip()
        == "error: Ray is not installed; in a checkout of NeuronLens: pip install '.[ray]'"
    )
    assert alone.end() == 2
    assert alone.stderr[-1].strip() == "error: no such file: d.jsonl"


def test_actors_require_ray(cli: Cli) -> None:
    ended = cli("fit", "--model", "m", "--data", "d.jsonl", "--actors", 2)
    assert ended.exit_code == 2
    assert "add --ray" in ended.stderr
