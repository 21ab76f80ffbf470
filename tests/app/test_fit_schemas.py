"""The data that a fit over HTTP may name."""

from pathlib import Path

import pytest

from app.jobs.schemas import DataRefused, DataUnusable, FitIn, source_of
from app.settings import Settings


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some files, and beside it a directory whose files may be read."""
    (tmp_path / "work" / "app" / "console").mkdir(parents=True)
    (tmp_path / "work" / "LICENSE").write_text("a license")
    (tmp_path / "work" / "gone").symlink_to("nowhere")
    (tmp_path / "work" / "rows.jsonl").write_text("{}")
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def with_hub(place: Path) -> Settings:
    return Settings(fit_hub=True, fit_dirs=(place / "allowed",))


@pytest.mark.parametrize("name", ["ag_news", "fancyzhx/ag_news", "app/news", "some-one/a.b_c"])
def test_names_of_the_hub_are_accepted_where_it_is_allowed(place: Path, name: str) -> None:
    assert source_of(FitIn(data=name), with_hub(place)) == name
    assert source_of(FitIn(data="train.jsonl"), with_hub(place)) == str(place / "allowed" / "train.jsonl")
    assert source_of(FitIn(dataset="ag_news"), with_hub(place)) is None
    with pytest.raises(DataUnusable):
        source_of(FitIn(data=name), Settings(fit_dirs=(place / "allowed",)))
    with pytest.raises(DataRefused):
        source_of(FitIn(data=name), Settings())


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "app",
        "app/console",
        "gone",
        "rows.jsonl",
        "missing.jsonl",
        "../allowed/train.jsonl",
        "../work",
        "..",
        ".",
        "app/..",
        "app/../LICENSE",
        "/etc/passwd",
        "/etc/nothing",
        "~/rows",
        "https://example.com/rows",
        "hf://datasets/ag_news",
        "file:///etc/passwd",
        "example.com:8000/rows",
        "user@host/rows",
        "a/b/c",
        "app/",
        "rows*",
        "a::b",
        "a\\b",
    ],
)
def test_other_names_are_rejected_like_missing_files(place: Path, name: str) -> None:
    """The message must not reveal whether a file of that name exists."""
    with pytest.raises(DataUnusable) as refused:
        source_of(FitIn(data=name), with_hub(place))
    with pytest.raises(DataUnusable) as missing:
        source_of(FitIn(data="missing.jsonl"), with_hub(place))
    assert str(refused.value) == str(missing.value)


def test_files_of_every_readable_format_may_be_named(place: Path) -> None:
    allowed = Settings(fit_dirs=(place / "allowed",))
    for name in ("a.jsonl", "A.JSONL.GZ", "b.json.bz2", "c.csv.xz", "d.tsv", "e.parquet", "a[1].csv.gz"):
        (place / "allowed" / name).write_bytes(b"")
        assert source_of(FitIn(data=name), allowed) == str(place / "allowed" / name)
    for name in ("a.txt", "b.gz", "c", ".jsonl", "d.parquet.gz", "e.csv.zip"):
        (place / "allowed" / name).write_bytes(b"")
        with pytest.raises(DataUnusable):
            source_of(FitIn(data=name), allowed)
