"""Settings that need more than a type: further models, the demo, no home directory."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.cli.demo import of_demo
from app.cli.exits import CommandError
from app.cli.listening import fit_command
from app.cli.stores import settings_with
from app.settings import Settings


def test_the_demo_has_its_own_store_and_the_reports_of_evaluate(tmp_path: Path) -> None:
    given = Settings(redis_url="redis://elsewhere", data_dir=tmp_path / "data")
    for cache_dir in (None, tmp_path / "cache"):
        made = of_demo(given, cache_dir)
        assert (made.redis_url, made.data_dir) == (None, cache_dir or given.data_dir / "demo")
        assert made.reports == given.reports == tmp_path / "data" / "reports"


def test_further_models_share_the_settings_of_the_first() -> None:
    also = ("sport=models/sport", "odd name=hub/model=1")
    settings = Settings(model="models/news", revision="abc", template="ag_news", dtype="bfloat16", also=also)
    first, sport, odd = settings.per_model()
    assert first == settings.model_copy(update={"also": ()})
    assert (sport.name, sport.model, odd.name, odd.model) == ("sport", "models/sport", "odd name", "hub/model=1")
    for other in (sport, odd):
        assert (other.revision, other.template, other.dtype, other.also) == (None, None, "bfloat16", ())


def test_the_environment_lists_further_models_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_ALSO", '["sport=/models/sport"]')
    assert [each.model for each in Settings(model="news").per_model()] == ["news", "/models/sport"]
    assert Settings().also, "commands that load no model accept this environment"


@pytest.mark.parametrize("also", ["models/sport", "=models/sport", "sport=", " =x", "sport =x", "a\nb=x"])
def test_invalid_further_models_are_rejected(also: str) -> None:
    with pytest.raises(ValidationError, match=r"NAME=CHECKPOINT|no name of a model"):
        Settings(model="news", also=(also,))


@pytest.mark.parametrize(
    ("name", "also"), [("one", ("two=a", "two=b")), ("one", ("one=b",)), (None, ("news=elsewhere/sport",))]
)
def test_names_of_models_are_unique(name: str | None, also: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="two models have the name"):
        Settings(model=str(tmp_path / "news"), name=name, also=also)


def test_users_without_a_home_must_name_a_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # an arbitrary user of a container: no HOME, and unknown to the system
    for variable in ("HOME", "XDG_DATA_HOME", "NEURONLENS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999)
    with pytest.raises(CommandError, match=r"data_dir: you have no home directory.*NEURONLENS_DATA_DIR"):
        settings_with()
    monkeypatch.setenv("NEURONLENS_DATA_DIR", str(tmp_path))
    assert fit_command(settings_with(), "my/model", "model").endswith(f" --data-dir {tmp_path}")
