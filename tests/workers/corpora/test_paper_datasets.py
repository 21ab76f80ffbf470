"""The paper's data sets are known by name, and their files get the class names of the hub."""

import json
import os
from pathlib import Path

import pytest

from workers.corpora.errors import CorpusError
from workers.corpora.loading import load_corpus
from workers.corpora.paper_datasets import PAPER_DATASETS


def test_known_data_sets_have_their_number_of_classes() -> None:
    assert {name: len(known.labels) for name, known in PAPER_DATASETS.items()} == {
        "imdb": 2,
        "sst2": 2,
        "ag_news": 4,
        "emotion": 6,
        "dbpedia_14": 14,
    }
    for known in PAPER_DATASETS.values():
        assert set(known.aliases.values()) <= set(known.labels)
        assert not set(known.aliases) & {label.casefold() for label in known.labels}


def test_labels_of_a_known_data_set_get_the_names_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in ("negative", "Pos", "neg", "odd"))
    )
    corpus = load_corpus(str(path), dataset="imdb")
    assert corpus.counts == {"neg": 2, "pos": 1, "odd": 1}
    assert load_corpus(str(path)).counts == {"Pos": 1, "neg": 1, "negative": 1, "odd": 1}


def test_class_names_of_the_model_are_kept(tmp_path: Path) -> None:
    """A model has the label names of the file it was trained on; numbers and names of the hub map to them."""
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


def test_class_numbers_and_columns_equal_those_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "sst.csv"
    path.write_text("idx,sentence,label\n0,fine,1\n1,dull,0\n2,bad,0\n")
    corpus = load_corpus(str(path), dataset="sst2")
    assert corpus.counts == {"negative": 2, "positive": 1}
    assert next(corpus.chunks()).texts == ("fine", "dull", "bad")


def test_rows_per_class_limits_every_class(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    rows = [{"text": f"{label} {n}", "label": label} for label, count in (("a", 50), ("b", 7)) for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(path), rows_per_class=10, seed=1)
    assert corpus.counts == {"a": 10, "b": 7}
    assert corpus.sha256 == load_corpus(str(path), rows_per_class=10, seed=1).sha256
    assert corpus.sha256 != load_corpus(str(path), rows_per_class=10, seed=2).sha256
    texts = next(corpus.chunks()).texts
    assert list(texts) == [row["text"] for row in rows if row["text"] in set(texts)], "the order of the rows changed"


def test_error_for_an_unknown_data_set_lists_the_known_ones() -> None:
    with pytest.raises(CorpusError, match="ag_news"):
        load_corpus("somewhere.jsonl", dataset="news")
    with pytest.raises(CorpusError, match="no data"):
        load_corpus(None)


@pytest.mark.data
def test_published_files_get_the_names_of_the_hub() -> None:
    data_dir = Path(os.environ["DATA"])
    imdb = load_corpus(str(data_dir / "imdb" / "test.jsonl"), dataset="imdb")
    assert imdb.counts == {"neg": 2500, "pos": 2500}
    for name in ("ag_news", "emotion"):
        corpus = load_corpus(str(data_dir / name / "test.jsonl"), dataset=name)
        assert tuple(corpus.counts) == PAPER_DATASETS[name].labels
