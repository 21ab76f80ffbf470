"""Every format gives the same corpus, chunks cover every row once, and bad input gives a one-line error."""

import json
from pathlib import Path

import datasets
import pytest

from tests.workers.checkpoints import LABELS
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.corpus import Corpus, match_labels, warn_about_overlap
from workers.corpora.errors import CorpusError
from workers.corpora.loading import load_corpus
from workers.corpora.sources import load_label_map

ROWS = [*labelled_texts(25, seed=0), ('odd, "quoted"\ttext\nwith é 漢字 🏆', "World")]


def pairs(corpus: Corpus) -> list[tuple[str, str]]:
    return [pair for chunk in corpus.chunks() for pair in zip(chunk.texts, chunk.concepts, strict=True)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def test_jsonl_csv_and_parquet_give_the_same_corpus(jsonl: Path, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"text": text, "label": label} for text, label in ROWS])
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    corpora = [load_corpus(str(path), labels=LABELS) for path in sorted(tmp_path.glob("rows.*"))]
    assert len(corpora) == 3
    assert all(pairs(corpus) == ROWS for corpus in corpora)
    assert len({corpus.sha256 for corpus in corpora}) == 1


def test_concepts_are_in_model_order_then_by_name(tmp_path: Path) -> None:
    rows = [("a", "Zebra"), ("b", "Sports"), ("c", "World"), ("d", "Apple"), ("e", "Sports")]
    corpus = load_corpus(str(write_jsonl(tmp_path / "rows.jsonl", rows)), labels=LABELS)
    assert corpus.concepts == ("World", "Sports", "Apple", "Zebra")
    assert corpus.counts == {"World": 1, "Sports": 2, "Apple": 1, "Zebra": 1}


def test_chunks_have_1024_rows_and_can_start_at_any_chunk(tmp_path: Path) -> None:
    rows = [(f"text {n}", LABELS[n % 4]) for n in range(2500)]
    corpus = load_corpus(str(write_jsonl(tmp_path / "rows.jsonl", rows)), labels=LABELS)
    assert [(chunk.index, len(chunk.texts)) for chunk in corpus.chunks()] == [(0, 1024), (1, 1024), (2, 452)]
    assert [chunk.texts[0] for chunk in corpus.chunks(1)] == ["text 1024", "text 2048"]
    assert pairs(corpus) == rows


def test_hash_depends_on_texts_labels_and_their_order(tmp_path: Path) -> None:
    def digest(rows: list[tuple[str, str]]) -> str:
        return load_corpus(str(write_jsonl(tmp_path / "rows.jsonl", rows))).sha256

    first = digest([("ab", "c"), ("d", "e")])
    assert digest([("ab", "c"), ("d", "e")]) == first
    assert (
        len({first, digest([("a", "bc"), ("d", "e")]), digest([("d", "e"), ("ab", "c")]), digest([("ab", "c")])}) == 4
    )


def test_max_rows_draws_a_seeded_sample(tmp_path: Path) -> None:
    """The first rows of a file sorted by class would have a single class."""
    rows = [(f"text {n}", LABELS[n // 250]) for n in range(1000)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    sample = load_corpus(path, labels=LABELS, max_rows=100)
    assert (len(sample), sample.selection) == (100, "100 of 1000 rows, drawn with seed 0")
    assert set(sample.concepts) == set(LABELS)
    assert pairs(sample) == sorted(pairs(sample), key=rows.index), "the order of the rows changed"
    assert load_corpus(path, labels=LABELS, max_rows=100).sha256 == sample.sha256
    assert load_corpus(path, labels=LABELS, max_rows=100, seed=1).sha256 != sample.sha256
    assert len(load_corpus(path, max_rows=5000)) == 1000


def test_class_numbers_get_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    named = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    named.to_parquet(tmp_path / "named.parquet")
    assert [concept for _, concept in pairs(load_corpus(str(tmp_path / "named.parquet")))] == ["pos", "neg"]
    (tmp_path / "plain.csv").write_text("text,label\na,2\nb,0\n")
    plain = load_corpus(str(tmp_path / "plain.csv"), labels=LABELS)
    assert [concept for _, concept in pairs(plain)] == ["Business", "World"]
    with pytest.raises(CorpusError, match=r"plain\.csv: row 1 has label 2, "):
        load_corpus(str(tmp_path / "plain.csv"), labels=("no", "yes"))


def test_numbers_are_the_same_classes_in_training_and_afterwards_in_every_format(tmp_path: Path) -> None:
    rows = [(f"text {number}", number % 12) for number in range(36)]
    write_jsonl(tmp_path / "names.jsonl", [(text, str(label)) for text, label in rows])
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    (tmp_path / "numbers.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    paths = [str(path) for path in tmp_path.iterdir()]
    for learned in map(load_corpus, paths):
        assert learned.concepts == tuple(str(number) for number in range(12))
        for path in paths:
            assert pairs(load_corpus(path, labels=learned.concepts)) == [(text, str(label)) for text, label in rows]


def test_class_numbers_that_may_be_counted_from_1_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "stars.csv").write_text("text,label\nawful,1\nbad,2\nso so,3\n")
    with pytest.raises(CorpusError, match=r"the smallest class number is 1, .*'Sports'.*'World'.*--label-map"):
        load_corpus(str(tmp_path / "stars.csv"), labels=LABELS)
    assert load_corpus(str(tmp_path / "stars.csv")).concepts == ("1", "2", "3")
    assert load_corpus(str(tmp_path / "stars.csv"), labels=("1", "2", "3")).counts == {"1": 1, "2": 1, "3": 1}


def test_a_selection_without_class_0_is_clear_where_the_rest_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(json.dumps({"text": f"text {n}", "label": min(n, 3)}) + "\n" for n in range(50))
    (tmp_path / "rows.jsonl").write_text(rows)
    corpus = load_corpus(str(tmp_path / "rows.jsonl"), labels=LABELS, max_rows=3)
    assert corpus.counts == {"SciTech": 3}
    warning = "rows.jsonl: class numbers are taken as positions in the list of labels: 0 is World, 1 is Sports, 2 is"
    assert warning in caplog.text


def test_columns_and_labels_can_be_renamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a goal", "topic": "sport", "id": 7}\n{"body": "a vote", "topic": "world", "id": 8}\n')
    label_map = tmp_path / "map.json"
    label_map.write_text(json.dumps({"sport": "Sports", "world": "World"}))
    corpus = load_corpus(
        str(path), labels=LABELS, text_field="body", label_field="topic", label_map=load_label_map(label_map)
    )
    assert pairs(corpus) == [("a goal", "Sports"), ("a vote", "World")]
    with pytest.raises(CorpusError, match=r"'text'.*'body', 'topic', 'id'"):
        load_corpus(str(path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "has no rows"),
        ("half.jsonl", b'{"text": "a", "label": "World"}\n{"text": "b", "lab', "cannot read"),
        ("latin.jsonl", b'{"text": "caf\xe9", "label": "World"}\n', "is not UTF-8"),
        ("notext.jsonl", b'{"text": "a", "label": "World"}\n{"text": null, "label": "World"}\n', "row 2 has no text"),
        ("nolabel.jsonl", b'{"text": "a", "label": "World"}\n{"text": "b", "label": null}\n', "row 2 has no label"),
        ("floats.jsonl", b'{"text": "a", "label": 0.5}\n', "row 1 has no label"),
        ("lists.jsonl", b'{"text": ["a"], "label": "World"}\n', "row 1 has no text"),
        ("rows.txt", b"a goal\n", "unknown kind of file"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("broken.parquet", b"PAR1 and then nothing", "cannot read"),
    ],
)
def test_bad_file_gives_a_one_line_error(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=says) as error:
        load_corpus(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file"):
        load_corpus(str(tmp_path / "nothing.jsonl"))


def test_texts_to_measure_on_that_were_learned_from_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(f"text {number}", LABELS[number % 4]) for number in range(20)]

    def corpus(name: str, rows: list[tuple[str, str]]) -> Corpus:
        return load_corpus(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), labels=LABELS)

    learned = corpus("train", rows)
    warn_about_overlap(corpus("other", [("other", "World")]), learned, "--eval-data")
    assert not caplog.text
    warn_about_overlap(corpus("some", [*rows[3:6], rows[3], ("other", "World")]), learned, "--eval-data")
    assert "--eval-data: 4 of 5 texts of some.jsonl are also in --data" in caplog.text
    warn_about_overlap(corpus("copy", rows), learned, "--test-data")
    assert "--test-data: 20 of 20 texts of copy.jsonl are also in --data" in caplog.text


def test_unmatched_labels_list_both_sides() -> None:
    match_labels(["World"], LABELS)
    with pytest.raises(CorpusError, match=r"'neg', 'pos'.*'negative', 'positive'.*--label-map"):
        match_labels(["neg", "pos"], ["negative", "positive"])


def test_label_map_gives_a_label_one_name(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"0": "World", "1": "Sports", "0": "World"}')
    assert load_label_map(path) == {"0": "World", "1": "Sports"}
    path.write_text("{}")
    assert load_label_map(path) == {}
    path.write_text('{"0": "World", "1": "Sports", "0": "Business"}')
    with pytest.raises(CorpusError, match="has '0' twice, as 'World' and as 'Business'"):
        load_label_map(path)


@pytest.mark.parametrize("content", ["[1]", "[]", '[["a", "b"]]', '{"a": 1}', '{"a": {"b": "c"}}', "{", "", '"a"'])
def test_label_map_must_be_an_object_of_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(CorpusError, match="label map"):
        load_label_map(tmp_path / "map.json")
