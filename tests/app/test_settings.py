"""Settings that need more than a type: lists, further models, the demo, no home directory; what bad ones report."""

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.cli.demo import demo_settings
from app.cli.exits import CommandError
from app.cli.options import settings_with
from app.cli.terminal import fit_command
from app.errors import USAGE
from app.settings import Settings


def test_the_demo_has_its_own_store_and_the_reports_of_evaluate(tmp_path: Path) -> None:
    given = Settings(redis_url="redis://elsewhere", data_dir=tmp_path / "data")
    for cache_dir in (None, tmp_path / "cache"):
        made = demo_settings(given, cache_dir)
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


def test_the_environment_lists_further_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_ALSO", "sport=/models/sport")
    assert [each.model for each in Settings(model="news").per_model()] == ["news", "/models/sport"]
    assert Settings().also, "commands that load no model accept this environment"


@pytest.mark.parametrize(
    ("written", "entries"),
    [
        ("a=1", ("a=1",)),
        ("a=1,b=2", ("a=1", "b=2")),
        (" a=1 , b=2, ", ("a=1", "b=2")),
        ('["a=1"]', ("a=1",)),
        (' ["a=1", "b=x,y"]', ("a=1", "b=x,y")),
        ("[]", ()),
        ("", ()),
    ],
)
def test_lists_are_separated_by_commas_or_json(
    written: str, entries: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURONLENS_ALSO", written)
    monkeypatch.setenv("NEURONLENS_FIT_DIRS", written)
    settings = Settings()
    assert (settings.also, settings.fit_dirs) == (entries, tuple(map(Path, entries)))


@pytest.mark.parametrize(
    "origin",
    ["https://a.example", "http://localhost:3000", "http://[::1]:80", "app://my_host", "chrome-extension://ab"],
)
def test_origins_as_browsers_send_them_are_accepted(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_CORS_ORIGINS", f"{origin},https://b.example")
    assert settings_with().cors_origins == (origin, "https://b.example")


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "a.example", "https://a.example/", "https://A.example", "https://u@a.example", "https://", "a b"],
)
def test_origins_that_no_browser_sends_are_refused(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_CORS_ORIGINS", f"https://b.example,{origin}")
    with pytest.raises(CommandError, match=rf"^NEURONLENS_CORS_ORIGINS: '{re.escape(origin)}' is not an origin"):
        settings_with()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_bad_setting_is_one_line_that_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a variable holds, there are settings, or a usage error; nobody sees a traceback."""
    variable = f"NEURONLENS_{name.upper()}"
    refused = []
    for value in (
        "",
        " ",
        "x",
        "-1",
        "1.5",
        "nan",
        "inf",
        "1e999",
        "9" * 5000,
        "[",
        '["',
        "[1]",
        "{}",
        "null",
        "é\n",
        "=,",
    ):
        monkeypatch.setenv(variable, value)
        try:
            settings_with()
        except CommandError as error:
            refused.append((error.exit_code, str(error)))
    for exit_code, line in refused:
        assert exit_code == USAGE
        assert line.startswith((f"{variable}: ", "NEURONLENS_MAX_SNAPSHOT_AGE (")), line
        assert line.isprintable(), line


def test_no_setting_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_POLL_SECONDS", "inf")
    with pytest.raises(CommandError, match=r"^NEURONLENS_POLL_SECONDS: .*finite"):
        settings_with()


def test_options_are_named_as_options_and_all_problems_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_PORT", "x")
    with pytest.raises(CommandError, match=r"^NEURONLENS_PORT: Input [^;]*; --max-replicas: Input [^;]*$"):
        settings_with(max_replicas=0)


@pytest.mark.parametrize("also", ["models/sport", "=models/sport", "sport=", " =x", "sport =x", "a\nb=x"])
def test_invalid_further_models_are_rejected(also: str) -> None:
    with pytest.raises(ValidationError, match=r"NAME=CHECKPOINT|invalid model name"):
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
    with pytest.raises(CommandError, match=r"^NEURONLENS_DATA_DIR: you have no home directory.*NEURONLENS_DATA_DIR"):
        settings_with()
    monkeypatch.setenv("NEURONLENS_DATA_DIR", str(tmp_path))
    assert fit_command(settings_with(), "my/model", "model").endswith(f" --data-dir {tmp_path}")
