"""A label means one concept in every command; what could mean two is an error that names both."""

from collections.abc import Sequence

import pytest

from workers.fitting.concepts import Concepts, LabelError
from workers.fitting.paper_datasets import PAPER_DATASETS

NEWS = ("World", "Sports", "Business", "SciTech")
TWELVE = tuple(str(number) for number in range(12))
SORTED_AS_TEXT = tuple(sorted(TWELVE))
"""The labels of a model that was trained before numbers were sorted as numbers."""


def named(labels: Sequence[str | int], concepts: Concepts) -> list[str]:
    return [concepts.of(label) for label in labels]


def test_a_label_of_the_model_means_that_label_wherever_it_stands() -> None:
    for labels in (TWELVE, SORTED_AS_TEXT):
        assert named(range(12), Concepts(labels)) == list(TWELVE)
        assert named(TWELVE, Concepts(labels)) == list(TWELVE)
    assert named([1, 2, 5], Concepts(("1", "2", "3", "4", "5"))) == ["1", "2", "5"]


def test_names_that_differ_in_their_unicode_form_are_one_concept() -> None:
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    for label in (composed, decomposed):
        assert named([composed, decomposed, "Tea"], Concepts((label, "Tea"))) == [label, label, "Tea"]
    assert named([decomposed, composed], Concepts(NEWS)) == [composed, composed]
    assert named([decomposed, composed], Concepts()) == [composed, composed]
    both = (composed, decomposed)
    assert named(both, Concepts(both)) == list(both), "of a model that has both"


def test_other_numbers_are_places_only_where_no_label_is_a_number() -> None:
    assert named([0, "3", 2], Concepts(NEWS)) == ["World", "SciTech", "Business"]
    with pytest.raises(LabelError, match=r"has label 0, but the model's labels are 1, 2, 3: .*--label-map"):
        Concepts(("1", "2", "3")).of(0)


@pytest.mark.parametrize("label", [4, "4", -1, 1990])
def test_a_number_beyond_the_labels_is_an_error(label: int | str) -> None:
    with pytest.raises(LabelError, match=rf"has label {label}, .* 0 \(World\) to 3 \(SciTech\): .*--label-map"):
        Concepts(NEWS).of(label)


def test_only_whole_numbers_as_they_are_written_are_class_numbers() -> None:
    assert named(["01", "1.0", "+1", "²", "-0"], Concepts(NEWS)) == ["01", "1.0", "+1", "²", "-0"]


@pytest.mark.parametrize("label", [None, True, 0.5, ["World"]])
def test_what_is_neither_a_name_nor_a_number_is_no_label(label: object) -> None:
    with pytest.raises(LabelError, match="has no label"):
        Concepts(NEWS).of(label)


def test_the_label_map_comes_first_for_numbers_too() -> None:
    names = {"0": "World", "1": "Sports", "2": "Business", "3": "SciTech"}
    for labels in ((), NEWS, tuple(reversed(NEWS)), TWELVE):
        assert named([0, 1, "2", "3"], Concepts(labels, label_map=names)) == list(NEWS)
    assert named([0, 1], Concepts(NEWS, PAPER_DATASETS["ag_news"].labels, {"0": "Politics"})) == ["Politics", "Sports"]


def test_a_label_map_may_name_what_a_number_stands_for_in_the_data() -> None:
    names = ("neg", "pos")
    assert named([0, 1], Concepts((), names, {"neg": "bad", "1": "good"})) == ["bad", "good"]
    with pytest.raises(LabelError, match=r"class number 0, which is 'neg'.*'bad' and 'good'"):
        Concepts((), names, {"neg": "good", "0": "bad"}).of(0)


def test_names_that_the_data_give_to_numbers_are_the_labels() -> None:
    assert named([1, 0, 2], Concepts(TWELVE, ("2", "0", "1"))) == ["0", "2", "1"]
    with pytest.raises(LabelError, match="class number -1, but the data name only 0 to 1"):
        Concepts(NEWS, ("neg", "pos")).of(-1)


def test_numbers_of_a_known_data_set_are_its_classes() -> None:
    known = PAPER_DATASETS["ag_news"]
    assert named([3, "3"], Concepts(known=known)) == ["Sci/Tech", "Sci/Tech"]
    assert named([3, "0"], Concepts(tuple(reversed(NEWS)), known=known)) == ["SciTech", "World"]
    with pytest.raises(LabelError, match=r"label 4, .* from 0 \(World\) to 3 \(Sci/Tech\)"):
        Concepts(known=known).of(4)
    with pytest.raises(LabelError, match=r"may be the model's label '2' or class 2 of the data set, 'Business'"):
        Concepts(TWELVE, known=known).of(2)
    assert Concepts(TWELVE, known=known).of("11") == "11"


def test_concepts_are_in_the_models_order_then_by_number_then_by_name() -> None:
    concepts = Concepts()
    found = named(["10", "Zebra", "2", "Apple", -1, 9], concepts)
    assert concepts.ordered(found) == ("-1", "2", "9", "10", "Apple", "Zebra")
    concepts = Concepts(("Zebra", "Apple"))
    assert concepts.ordered(named(["Moon", "Apple", "Zebra"], concepts)) == ("Zebra", "Apple", "Moon")


def test_classes_of_a_new_model_are_in_the_order_of_their_numbers() -> None:
    """So that numbers without names mean the same classes when they are read for that model."""
    fresh = Concepts(label_map={"0": "World", "1": "Sports", "2": "Business", "3": "SciTech"})
    labels = fresh.ordered(set(named([3, 1, 2, 0], fresh)))
    assert labels == NEWS
    assert named([0, 1, 2, 3], Concepts(labels)) == list(NEWS)
    fresh = Concepts()
    assert fresh.ordered(set(named([11, 2, 10, 0], fresh))) == ("0", "2", "10", "11")
    fresh = Concepts(names=("World", "Sports", "Business"))
    assert fresh.ordered(set(named([2, 1, 0], fresh))) == ("World", "Sports", "Business")
    fresh = Concepts(known=PAPER_DATASETS["imdb"], label_map={"neg": "worse", "pos": "better"})
    assert fresh.ordered(set(named(["pos", "neg"], fresh))) == ("worse", "better")


def test_numbers_without_a_0_may_be_counted_from_0_or_from_1() -> None:
    concepts = Concepts(NEWS)
    assert concepts.counted_from_0() is None
    named(["World", 2, 1], concepts)
    assert "1, which means 'Sports' if classes are counted from 0, but 'World'" in str(concepts.counted_from_0())
    named([0], concepts)
    assert concepts.counted_from_0() is None
    numbered = Concepts(TWELVE)
    named([1, 2], numbered)
    assert numbered.counted_from_0() is None, "these are names"
