"""Texts and labels are read as they were written, from every kind of file; a bad row is named."""

import bz2
import csv
import functools
import gzip
import http.server
import json
import lzma
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.corpora import rows
from workers.corpora.data_names import format_of
from workers.corpora.errors import CorpusError
from workers.corpora.files import columns_of, files_of, labels_of, read_tables, texts_of
from workers.corpora.loading import load_corpus
from workers.corpora.sources import check_source

Pairs = list[tuple[Any, Any]]


def write(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    """Texts and labels, in the format that the name says."""
    name = path.name
    opened: Callable[..., Any] = open
    for suffix, opener in ((".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)):
        if path.name.endswith(suffix):
            opened, name = opener, path.name.removesuffix(suffix)
    if name.endswith(".parquet"):
        pa.parquet.write_table(pa.table({"text": [t for t, _ in pairs], "label": [n for _, n in pairs]}), path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if name.endswith(".jsonl"):
            stream.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        elif name.endswith(".json"):
            json.dump([{"text": text, "label": label} for text, label in pairs], stream, indent=1)
        else:
            writer = csv.writer(stream, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writerows([("text", "label"), *pairs])
    return path


def read(path: Path, text: str = "text", label: str = "label") -> Pairs:
    found = list(read_tables(str(path), text, label))
    return [pair for table in found for pair in zip(texts_of(table), labels_of(table), strict=True)]


KINDS = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl.gz", "rows.CSV", "a.csv.xz")
ODD = [
    "",
    "NA",
    "null",
    "#N/A",
    "None",
    "True",
    "1",
    "01",
    "0815",
    "1.0",
    "nan",
    "2020-01-01",
    "2020-01-01 10:00:00",
    " ",
]


@pytest.mark.parametrize("name", [*KINDS, "rows.tsv.bz2", "rows.json.gz"])
def test_no_text_and_no_label_is_taken_for_anything_else(tmp_path: Path, name: str) -> None:
    pairs = [(text, label) for text in ODD for label in (*ODD, 'Sports, and\n"more"\tof it')]
    assert read(write(tmp_path / name, pairs)) == pairs


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1)), min_size=1
    )
)
def test_every_kind_of_file_gives_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    place = tmp_path_factory.mktemp("files")
    for name in KINDS:
        assert read(write(place / name, pairs)) == pairs, name


def test_labels_of_json_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = [1, "1", True, None, 0.5, ["a"], {"a": 1}, "b", 2**70]
    path.write_text("\n\n".join(json.dumps({"text": "t", "label": value}) for value in values))
    assert read(path) == [("t", value) for value in (1, "1", True, None, None, None, None, "b", 2**70)]


def test_texts_with_half_of_a_surrogate_pair_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud800", "label": "x"}\n')
    assert read(path) == [("a \ud800", "x")]
    assert load_corpus(str(path)).odd == 1


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.tsv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [("a", "x")])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == [("a", "x")]


def test_missing_columns_of_a_row_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"label": "x", "more": [1]}\n')
    assert read(path) == [("a", None), (None, "x")]
    assert columns_of([str(path)]) == (("text", "label", "more"), {})


def test_parquet_names_its_class_numbers(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / "named.parquet")
    assert columns_of([str(tmp_path / "named.parquet")]) == (("text", "label"), {"label": ["neg", "pos"]})
    plain = write(tmp_path / "plain.parquet", [("a", "x")])
    assert columns_of([str(plain)]) == (("text", "label"), {})
    categories = pa.table({"text": ["a"], "label": pa.array(["x"]).dictionary_encode()})
    pa.parquet.write_table(categories, plain)
    assert read(plain) == [("a", "x")]


CELLS = "3 cells, but the header has 2: a text with a"
QUOTES = "is quoted wrongly ("
GOOD = '{"text": "a", "label": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nThe side, won.,Sports\n", f"a.csv: row 1 (line 2) has {CELLS} comma must"),
        ("a.csv", 'text,label\n\na,x\n"b\nb",y\nc, d,z\n', f"a.csv: row 3 (line 6) has {CELLS} comma must"),
        ("a.csv", "text,label,n\na,x,1\nb,y\n", "a.csv: row 2 (line 3) has 2 cells, but the header has 3: "),
        ("a.tsv", "text\tlabel\na\tb\tx\n", f"a.tsv: row 1 (line 2) has {CELLS} tab must"),
        ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', f"cannot read a.csv: row 2 (line 3) {QUOTES}unexpected end of data)"),
        ("a.csv", 'text,label\n"b" said,y\n', f"cannot read a.csv: row 1 (line 2) {QUOTES}',' expected after"),
        ("a.csv", "text,text,label\na,b,x\n", "a.csv: the header names the column 'text' twice"),
        ("a.csv", b"text,label\na,x\ncaf\xe9,y\n", "a.csv: row 2 (line 3) is not UTF-8"),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), "a.csv: the header is not UTF-8"),
        ("a.jsonl", GOOD + '\n{"text": ', "cannot read a.jsonl: row 2 is not JSON (Expecting value, at character"),
        ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}', "a.jsonl: row 2 is not UTF-8"),
        ("a.jsonl", GOOD + '"b"\n', 'a.jsonl: row 2 is not an object such as {"text": "…", "label": "…"}'),
        ("a.json", f'[{GOOD},\n "b"]', "a.json: row 2 is not an object"),
        ("a.json", f"[{GOOD},\n", "cannot read a.json: the array is not JSON"),
        ("a.jsonl", "[" * 100_000, "cannot read a.jsonl: the array is not JSON"),
        ("a.jsonl.gz", "no gzip", "cannot read a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 9, mtime=0)[:-9], "cannot read a.jsonl.gz: Compressed file ended"),
        ("a.csv.xz", "no xz", "cannot read a.csv.xz: "),
        ("a.parquet", "PAR1 and then nothing", "cannot read a.parquet: "),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError) as error:
        read(path)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_rows_of_several_files_are_named_by_file_and_row(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.parquet"):
        write(tmp_path / name, [(f"{name} {number}", "x") for number in range(5)])
    (tmp_path / "empty.jsonl").write_text("")
    corpus = load_corpus(str(tmp_path))
    assert [text for chunk in corpus.chunks() for text in chunk.texts] == [
        f"{name} {number}" for name in ("a.csv", "b.jsonl", "c.parquet") for number in range(5)
    ]
    write(tmp_path / "b.jsonl", [("a", "x"), ("b", "x")])
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write('{"text": null, "label": "x"}\n')
    with pytest.raises(CorpusError, match=r"^b\.jsonl: row 3 has no text"):
        load_corpus(str(tmp_path))
    with pytest.raises(CorpusError, match=r"^b\.jsonl: row 3 has no text"):
        load_corpus(str(tmp_path), rows_per_class=100)


def test_large_corpora_are_kept_in_a_file_and_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.csv", [(f"text {number}", f"class {number % 3}") for number in range(9000)])
    small = load_corpus(str(path), max_rows=3000)
    monkeypatch.setattr(rows, "MAX_BYTES_IN_MEMORY", 10_000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    large = load_corpus(str(path), max_rows=3000)
    assert (large.sha256, len(large)) == (small.sha256, 3000)
    assert [chunk.texts for chunk in large.chunks(2)] == [chunk.texts for chunk in small.chunks(2)]
    assert list((tmp_path / "cache").iterdir()) == []


def test_characters_of_patterns_mean_themselves_where_such_a_file_exists(tmp_path: Path) -> None:
    names = [
        "a[1].jsonl",
        "a1.jsonl",
        "b*.csv",
        "b2.csv",
        "c?.jsonl",
        "[x].tsv",
        "d::e.jsonl",
        "{f,g}.csv",
        "~.jsonl",
        "h#i.csv",
    ]
    for name in names:
        write(tmp_path / name, [(name, "x")])
    for name in names:
        assert read(tmp_path / name) == [(name, "x")]
        assert files_of(str(tmp_path / name)) == (str(tmp_path / name),)
        assert load_corpus(str(tmp_path / name)).name == name
    assert files_of(str(tmp_path / "a[0-9].jsonl")) == (str(tmp_path / "a1.jsonl"),)
    assert len(load_corpus(str(tmp_path / "*.csv"))) == 4
    (tmp_path / "in [1]").mkdir()
    write(tmp_path / "in [1]" / "rows.jsonl", [("inside", "x")])
    assert read(tmp_path / "in [1]" / "rows.jsonl") == [("inside", "x")]
    assert len(files_of(str(tmp_path / "in [1]"))) == 1


def test_a_directory_must_not_mix_splits(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", ".hidden.jsonl"):
        write(tmp_path / name, [("a", "x")])
    (tmp_path / "readme.md").write_text("")
    assert len(load_corpus(str(tmp_path))) == 2
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "test.jsonl", [("a", "x")])
    with pytest.raises(CorpusError, match=r"several splits, such as test\.jsonl and train-0\.jsonl"):
        check_source(str(tmp_path))
    assert len(load_corpus(str(tmp_path / "train*.jsonl"))) == 2


def test_directories_of_the_datasets_library_are_read(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    made.save_to_disk(tmp_path / "one")
    assert load_corpus(str(tmp_path / "one")).counts == {"x": 1, "y": 1}
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load_corpus(str(tmp_path / "two"))) == 2
    assert len(load_corpus(str(tmp_path / "two"), split="test")) == 1
    with pytest.raises(CorpusError, match="has no split 'dev'; it has: 'train', 'test'"):
        load_corpus(str(tmp_path / "two"), split="dev")


def test_unreadable_sources_are_errors_of_the_early_check(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    (tmp_path / "none").mkdir()
    for source, message in (
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path / "missing", "no such file"),
        ("./missing", "no such file"),
        ("a/b/c", "no such file"),
        (tmp_path / "*.jsonl", "no such file"),
        (tmp_path / "rows.txt", "unknown kind of file; use .jsonl"),
        (tmp_path / "rows.parquet.gz", "unknown kind of file"),
        (tmp_path / "none", "has no files that can be read: .jsonl"),
    ):
        with pytest.raises(CorpusError, match=message):
            check_source(str(source))
    check_source("ag_news")
    check_source("fancyzhx/ag_news")
    check_source(None)


def test_addresses_are_read(tmp_path: Path) -> None:
    """From a server that can only stream."""
    pairs = [(f'text "{number}"\n', "x") for number in range(5000)]
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("rows.jsonl", "rows.csv", "rows.json", "rows.csv.gz"):
            write(tmp_path / name, pairs)
            address = f"http://127.0.0.1:{server.server_address[1]}/{name}"
            assert files_of(address) == (address,)
            found = list(read_tables(address, "text", "label"))
            assert [text for table in found for text in texts_of(table)] == [text for text, _ in pairs], name
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said: Any) -> None:
        pass


def test_format_follows_from_the_name() -> None:
    names = ("a.b.jsonl.gz", "A.CSV", "/x.y/a.tsv.XZ", "a.parquet", "a.json.bz2")
    assert list(map(format_of, names)) == ["json", "csv", "tsv", "parquet", "json"]
    others = ("a.gz", "a.txt", "jsonl", ".jsonl", "a.parquet.gz", "a.jsonl.zip", "")
    assert set(map(format_of, others)) == {None}
