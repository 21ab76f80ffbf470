"""What a job works on is looked for before torch is loaded, which takes many seconds."""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from tests.app.cli.conftest import Cli
from workers.models.errors import CheckpointError
from workers.models.source import check_checkpoint


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a checkpoint `my-model` and texts, where nothing can load torch and no hub can be reached."""
    monkeypatch.setitem(sys.modules, "app.serving.loading", None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", MagicMock(side_effect=ConnectionError("no route")))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", MagicMock(side_effect=ConnectionError("no route")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "label": "b"}))
    return tmp_path


FIT = ("fit", "--model", "my-model", "--data", "rows.jsonl")
EVALUATE = ("evaluate", "--model", "my-model", "--data", "rows.jsonl", "--test-data", "other.jsonl")
TRAIN = ("train", "--base", "my-model", "--data", "rows.jsonl", "--out", "out")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((*FIT, "--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        ((*FIT, "--dataset", "news"), "unknown data set 'news'"),
        ((*FIT, "--label-map", "nowhere.json"), "nowhere.json"),
        ((*FIT, "--template", "nowhere"), "no prompt template 'nowhere'"),
        ((*FIT, "--model", "my-modle"), "no such directory: my-modle; did you mean my-model?"),
        ((*FIT, "--model", "./my-modle"), "no such directory: ./my-modle"),
        ((*FIT, "--model", "nowhere/at/all"), "no such directory: nowhere/at/all"),
        ((*FIT, "--model", "rows.jsonl"), "rows.jsonl is a file"),
        ((*FIT, "--model", "empty"), "empty holds no config.json"),
        (EVALUATE, "no such file: other.jsonl"),
        ((*EVALUATE, "--test-data", "my-model/", "--model", "my-modle"), "no such directory: my-modle"),
        ((*EVALUATE, "--select-on", "nowhere.csv", "--test-data", "hub-name"), "no such file: nowhere.csv"),
        ((*TRAIN, "--base", "my-modle"), "no such directory: my-modle"),
        ((*TRAIN, "--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        ((*TRAIN, "--eval-data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        ((*TRAIN, "--out", "my-model"), "my-model is not empty"),
        (("serve", "--model", "my-modle"), "no such directory: my-modle"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_loaded(
    cli: Cli, place: Path, command: tuple[str, ...], message: str
) -> None:
    ended = cli(*command)
    assert ended.exit_code == 2
    assert message in ended.stderr


def test_a_range_set_that_is_not_there_is_told_before_torch_is_loaded(cli: Cli, place: Path) -> None:
    (place / "other.jsonl").write_text(json.dumps({"text": "c", "label": "b"}))
    ended = cli(
        "evaluate", "--model", "my-model", "--range-set", "nowhere", "--test-data", "other.jsonl", "--data-dir", place
    )
    assert ended.exit_code == 4
    assert "no published range set 'nowhere'" in ended.stderr


def test_a_data_set_that_the_hub_does_not_have_is_told_at_once(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = RepositoryNotFoundError("not found", response=MagicMock(headers={}))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", MagicMock(side_effect=unknown))
    ended = cli(*FIT, "--data", "my-data")
    assert ended.exit_code == 2
    assert "no such file or directory: my-data, nor a data set of that name on the hub" in ended.stderr


def test_names_on_the_hub_are_left_to_loading(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"some/model; as a name on the hub, it is not in the cache, and the hub"):
        check_checkpoint("some/model")
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", MagicMock())
    check_checkpoint("some/model")
    unknown = RepositoryNotFoundError("not found", response=MagicMock(headers={}))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", MagicMock(side_effect=unknown))
    with pytest.raises(CheckpointError, match="some/model; as a name on the hub, it is not known there"):
        check_checkpoint("some/model")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    check_checkpoint("some/model")  # offline, from the cache
