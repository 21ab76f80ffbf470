"""The data that a fit over HTTP may name."""

from pathlib import Path

import pytest

from app.jobs.schemas import DATA_FILE, DataRefused, DataUnusable, FitIn, source_of
from app.settings import Settings
from workers.fitting.files import COMPRESSED, KINDS, kind_of


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


def test_files_of_every_kind_that_can_be_read_may_be_named(place: Path) -> None:
    names = [
        f"a.b{kind}{compressed}" for kind in (*KINDS, ".txt", ".gz", "") for compressed in (*COMPRESSED, "", ".zip")
    ]
    for name in [*names, "A.JSONL.GZ", ".jsonl", "a[1]?*.csv", "a::b.tsv", "é\n.csv"]:
        assert bool(DATA_FILE.fullmatch(name)) == (kind_of(name) is not None), name
    (place / "allowed" / "a[1].csv.gz").write_bytes(b"")
    assert source_of(FitIn(data="a[1].csv.gz"), with_hub(place)) == str(place / "allowed" / "a[1].csv.gz")
