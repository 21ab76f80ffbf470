"""The paper's data sets by name: files of them get the hub's class names."""

import json
import os
from pathlib import Path

import pytest

from workers.fitting.corpus import CorpusError, load_corpus
from workers.fitting.known import KNOWN


def test_the_papers_five_are_known_with_as_many_classes_as_they_have() -> None:
    assert {name: len(known.labels) for name, known in KNOWN.items()} == {
        "imdb": 2,
        "sst2": 2,
        "ag_news": 4,
        "emotion": 6,
        "dbpedia_14": 14,
    }
    for known in KNOWN.values():
        assert set(known.aliases.values()) <= set(known.labels)
        assert not set(known.aliases) & {label.casefold() for label in known.labels}


def test_a_file_of_a_known_data_set_gets_the_hubs_names(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in ("negative", "Pos", "neg", "odd"))
    )
    corpus = load_corpus(str(path), dataset="imdb")
    assert corpus.counts == {"neg": 2, "pos": 1, "odd": 1}
    assert load_corpus(str(path)).counts == {"Pos": 1, "neg": 1, "negative": 1, "odd": 1}


def test_names_that_a_model_has_for_the_classes_are_kept(tmp_path: Path) -> None:
    """A model that was trained on a file calls its labels as that did; hub numbers and names must find them."""
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in ("neg", "positive", "neg")))
    assert load_corpus(str(path), dataset="imdb", labels=("positive", "negative")).counts == {
        "positive": 1,
        "negative": 2,
    }
    path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in (0, 1, 1)))
    assert load_corpus(str(path), dataset="imdb", labels=("positive", "negative")).counts == {
        "positive": 2,
        "negative": 1,
    }


def test_class_numbers_and_columns_are_those_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "sst.csv"
    path.write_text("idx,sentence,label\n0,fine,1\n1,dull,0\n2,bad,0\n")
    corpus = load_corpus(str(path), dataset="sst2")
    assert corpus.counts == {"negative": 2, "positive": 1}
    assert next(corpus.blocks()).texts == ("fine", "dull", "bad")


def test_rows_per_class_cap_every_class(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    rows = [{"text": f"{label} {n}", "label": label} for label, count in (("a", 50), ("b", 7)) for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(path), rows_per_class=10, seed=1)
    assert corpus.counts == {"a": 10, "b": 7}
    assert corpus.sha256 == load_corpus(str(path), rows_per_class=10, seed=1).sha256
    assert corpus.sha256 != load_corpus(str(path), rows_per_class=10, seed=2).sha256
    texts = next(corpus.blocks()).texts
    assert list(texts) == [row["text"] for row in rows if row["text"] in set(texts)], "the order stays"


def test_unknown_names_and_missing_data_say_what_there_is() -> None:
    with pytest.raises(CorpusError, match="ag_news"):
        load_corpus("somewhere.jsonl", dataset="news")
    with pytest.raises(CorpusError, match="no data"):
        load_corpus(None)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("DATA"), reason="set DATA to the directory of the public data sets")
def test_published_files_get_the_hubs_names() -> None:
    data_dir = Path(os.environ["DATA"])
    imdb = load_corpus(str(data_dir / "imdb" / "test.jsonl"), dataset="imdb")
    assert imdb.counts == {"neg": 2500, "pos": 2500}
    for name in ("ag_news", "emotion"):
        corpus = load_corpus(str(data_dir / name / "test.jsonl"), dataset=name)
        assert tuple(corpus.counts) == KNOWN[name].labels
