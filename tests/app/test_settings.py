"""Settings that need more than a type: the models that are served beside the first; the demo; no home directory."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.cli.demo import of_demo
from app.cli.exits import CommandError
from app.cli.listening import fit_command
from app.cli.stores import settings_with
from app.settings import Settings


def test_the_demo_has_a_store_of_its_own_and_shows_the_reports_of_evaluate(tmp_path: Path) -> None:
    given = Settings(redis_url="redis://elsewhere", data_dir=tmp_path / "data")
    for cache_dir in (None, tmp_path / "cache"):
        made = of_demo(given, cache_dir)
        assert (made.redis_url, made.data_dir) == (None, cache_dir or given.data_dir / "demo")
        assert made.reports == given.reports == tmp_path / "data" / "reports"


def test_each_model_has_the_settings_of_the_first_but_for_what_is_its_own() -> None:
    also = ("sport=models/sport", "odd name=hub/model=1")
    settings = Settings(model="models/news", revision="abc", template="ag_news", dtype="bfloat16", also=also)
    first, sport, odd = settings.per_model()
    assert first == settings.model_copy(update={"also": ()})
    assert (sport.name, sport.model, odd.name, odd.model) == ("sport", "models/sport", "odd name", "hub/model=1")
    for other in (sport, odd):
        assert (other.revision, other.template, other.dtype, other.also) == (None, None, "bfloat16", ())


def test_the_environment_names_further_models_as_a_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_ALSO", '["sport=/models/sport"]')
    assert [each.model for each in Settings(model="news").per_model()] == ["news", "/models/sport"]
    assert Settings().also, "commands that load nothing take such an environment, too"


@pytest.mark.parametrize("also", ["models/sport", "=models/sport", "sport=", " =x", "sport =x", "a\nb=x"])
def test_what_names_no_checkpoint_is_refused(also: str) -> None:
    with pytest.raises(ValidationError, match=r"NAME=CHECKPOINT|no name of a model"):
        Settings(model="news", also=(also,))


@pytest.mark.parametrize(
    ("name", "also"), [("one", ("two=a", "two=b")), ("one", ("one=b",)), (None, ("news=elsewhere/sport",))]
)
def test_no_two_models_have_one_name(name: str | None, also: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="two models have the name"):
        Settings(model=str(tmp_path / "news"), name=name, also=also)


def test_who_has_no_home_is_asked_for_a_directory_and_hints_name_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # a container's arbitrary user: no HOME, and unknown to the system
    for variable in ("HOME", "XDG_DATA_HOME", "NEURONLENS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999)
    with pytest.raises(CommandError, match=r"data_dir: you have no home directory.*NEURONLENS_DATA_DIR"):
        settings_with()
    monkeypatch.setenv("NEURONLENS_DATA_DIR", str(tmp_path))
    assert fit_command(settings_with(), "my/model", "model").endswith(f" --data-dir {tmp_path}")
