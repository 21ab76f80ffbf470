"""A label means one concept in every command; what could mean two is an error that names both."""

from collections.abc import Sequence

import pytest

from workers.corpora.concepts import ConceptNames, LabelError
from workers.corpora.paper_datasets import PAPER_DATASETS

NEWS = ("World", "Sports", "Business", "SciTech")
TWELVE = tuple(str(number) for number in range(12))
SORTED_AS_TEXT = tuple(sorted(TWELVE))
"""The labels of a model that was trained before numbers were sorted as numbers."""


def named(labels: Sequence[str | int], concepts: ConceptNames) -> list[str]:
    return [concepts.name(label) for label in labels]


def test_a_label_of_the_model_means_that_label_wherever_it_stands() -> None:
    for labels in (TWELVE, SORTED_AS_TEXT):
        assert named(range(12), ConceptNames(labels)) == list(TWELVE)
        assert named(TWELVE, ConceptNames(labels)) == list(TWELVE)
    assert named([1, 2, 5], ConceptNames(("1", "2", "3", "4", "5"))) == ["1", "2", "5"]


def test_names_that_differ_in_their_unicode_form_are_one_concept() -> None:
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    for label in (composed, decomposed):
        assert named([composed, decomposed, "Tea"], ConceptNames((label, "Tea"))) == [label, label, "Tea"]
    assert named([decomposed, composed], ConceptNames(NEWS)) == [composed, composed]
    assert named([decomposed, composed], ConceptNames()) == [composed, composed]
    both = (composed, decomposed)
    assert named(both, ConceptNames(both)) == list(both), "of a model that has both"


def test_other_numbers_are_places_only_where_no_label_is_a_number() -> None:
    assert named([0, "3", 2], ConceptNames(NEWS)) == ["World", "SciTech", "Business"]
    with pytest.raises(LabelError, match=r"has label 0, but the model's labels are 1, 2, 3: .*--label-map"):
        ConceptNames(("1", "2", "3")).name(0)


@pytest.mark.parametrize("label", [4, "4", -1, 1990])
def test_a_number_beyond_the_labels_is_an_error(label: int | str) -> None:
    with pytest.raises(LabelError, match=rf"has label {label}, .* 0 \(World\) to 3 \(SciTech\): .*--label-map"):
        ConceptNames(NEWS).name(label)


def test_only_whole_numbers_as_they_are_written_are_class_numbers() -> None:
    assert named(["01", "1.0", "+1", "²", "-0"], ConceptNames(NEWS)) == ["01", "1.0", "+1", "²", "-0"]


@pytest.mark.parametrize("label", [None, True, 0.5, ["World"]])
def test_what_is_neither_a_name_nor_a_number_is_no_label(label: object) -> None:
    with pytest.raises(LabelError, match="has no label"):
        ConceptNames(NEWS).name(label)


def test_the_label_map_comes_first_for_numbers_too() -> None:
    names = {"0": "World", "1": "Sports", "2": "Business", "3": "SciTech"}
    for labels in ((), NEWS, tuple(reversed(NEWS)), TWELVE):
        assert named([0, 1, "2", "3"], ConceptNames(labels, label_map=names)) == list(NEWS)
    mapped = ConceptNames(NEWS, PAPER_DATASETS["ag_news"].labels, {"0": "Politics"})
    assert named([0, 1], mapped) == ["Politics", "Sports"]


def test_a_label_map_may_name_what_a_number_stands_for_in_the_data() -> None:
    names = ("neg", "pos")
    assert named([0, 1], ConceptNames((), names, {"neg": "bad", "1": "good"})) == ["bad", "good"]
    with pytest.raises(LabelError, match=r"class number 0, which is 'neg'.*'bad' and 'good'"):
        ConceptNames((), names, {"neg": "good", "0": "bad"}).name(0)


def test_names_that_the_data_give_to_numbers_are_the_labels() -> None:
    assert named([1, 0, 2], ConceptNames(TWELVE, ("2", "0", "1"))) == ["0", "2", "1"]
    with pytest.raises(LabelError, match="class number -1, but the data name only 0 to 1"):
        ConceptNames(NEWS, ("neg", "pos")).name(-1)


def test_numbers_of_a_known_data_set_are_its_classes() -> None:
    known = PAPER_DATASETS["ag_news"]
    assert named([3, "3"], ConceptNames(dataset=known)) == ["Sci/Tech", "Sci/Tech"]
    assert named([3, "0"], ConceptNames(tuple(reversed(NEWS)), dataset=known)) == ["SciTech", "World"]
    with pytest.raises(LabelError, match=r"label 4, .* from 0 \(World\) to 3 \(Sci/Tech\)"):
        ConceptNames(dataset=known).name(4)
    with pytest.raises(LabelError, match=r"may be the model's label '2' or class 2 of the data set, 'Business'"):
        ConceptNames(TWELVE, dataset=known).name(2)
    assert ConceptNames(TWELVE, dataset=known).name("11") == "11"


def test_concepts_are_in_the_models_order_then_by_number_then_by_name() -> None:
    concepts = ConceptNames()
    found = named(["10", "Zebra", "2", "Apple", -1, 9], concepts)
    assert concepts.sort(found) == ("-1", "2", "9", "10", "Apple", "Zebra")
    concepts = ConceptNames(("Zebra", "Apple"))
    assert concepts.sort(named(["Moon", "Apple", "Zebra"], concepts)) == ("Zebra", "Apple", "Moon")


def test_classes_of_a_new_model_are_in_the_order_of_their_numbers() -> None:
    """So that numbers without names mean the same classes when they are read for that model."""
    fresh = ConceptNames(label_map={"0": "World", "1": "Sports", "2": "Business", "3": "SciTech"})
    labels = fresh.sort(set(named([3, 1, 2, 0], fresh)))
    assert labels == NEWS
    assert named([0, 1, 2, 3], ConceptNames(labels)) == list(NEWS)
    fresh = ConceptNames()
    assert fresh.sort(set(named([11, 2, 10, 0], fresh))) == ("0", "2", "10", "11")
    fresh = ConceptNames(class_names=("World", "Sports", "Business"))
    assert fresh.sort(set(named([2, 1, 0], fresh))) == ("World", "Sports", "Business")
    fresh = ConceptNames(dataset=PAPER_DATASETS["imdb"], label_map={"neg": "worse", "pos": "better"})
    assert fresh.sort(set(named(["pos", "neg"], fresh))) == ("worse", "better")


def test_numbers_without_a_0_may_be_ambiguity_or_from_1() -> None:
    concepts = ConceptNames(NEWS)
    assert concepts.ambiguity() is None
    named(["World", 2, 1], concepts)
    assert "1, which means 'Sports' if classes are counted from 0, but 'World'" in str(concepts.ambiguity())
    named([0], concepts)
    assert concepts.ambiguity() is None
    numbered = ConceptNames(TWELVE)
    named([1, 2], numbered)
    assert numbered.ambiguity() is None, "these are names"
