"""From what stands in the label column to the name of a concept: one rule for every command and every kind of file."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.fitting.errors import CorpusError
from workers.fitting.paper_datasets import PaperDataset

_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
"""How a whole number is written; "01" is a name like any other."""


class LabelError(CorpusError):
    """A label that means nothing, or may mean two things; a sentence that begins with the row."""


@dataclass
class Concepts:
    """Names the concept of a label.

    Labels are compared as they are written, so that a number in JSON and the same number in CSV are one label. Names
    that look alike, since they differ in their Unicode form only, are one concept. What applies first decides:

    1. The label map has the label, or the class name that it stands for in the data.
    2. The data name their class numbers: the number is that name.
    3. The model has a label of that name.
    4. The data set is known (`PAPER_DATASETS`): class numbers and other names of its classes are those classes.
    5. It is a class number, counted from 0, of a model none of whose labels is a number.
    6. The label is the name of a concept that the model does not know.

    Attributes:
        labels: those of the model; none if it is still to be trained.
        names: names of class numbers, where the data have them.
    """

    labels: Sequence[str] = ()
    names: Sequence[str] | None = None
    label_map: Mapping[str, str] = field(default_factory=dict)
    known: PaperDataset | None = None
    counted: dict[int, str] = field(default_factory=dict, init=False)
    """Class numbers met so far that nothing but their order names, and the concepts that they were taken for."""
    _found: dict[str | int, str] = field(default_factory=dict, init=False)
    _numbers: dict[str, int] = field(default_factory=dict, init=False)
    """The smallest class number of each concept that has one."""

    def of(self, label: Any) -> str:
        """The concept of a label. Raises LabelError."""
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise LabelError("has no label (a name or a whole number)")
        concept = self._found.get(label)
        if concept is None:
            concept = self._found[label] = self._name(label)
        return concept

    def ordered(self, concepts: Iterable[str]) -> tuple[str, ...]:
        """The model's labels in their order, then concepts with class numbers by these, then others by name."""
        places = {label: place for place, label in enumerate(self.labels)}

        def place(concept: str) -> tuple[int, int, str]:
            if concept in places:
                return 0, places[concept], ""
            return (1, self._numbers[concept], concept) if concept in self._numbers else (2, 0, concept)

        return tuple(sorted(concepts, key=place))

    def counted_from_0(self) -> str | None:
        """What two things class numbers may mean if none of the corpus is 0; None if they are clear."""
        if not self.counted or 0 in self.counted:
            return None
        number = min(self.counted)
        names = self._counted_names
        return (
            f"the smallest class number is {number}, which means {names[number]!r} if classes are counted from 0, but "
            f"{names[number - 1]!r} if they are counted from 1: say what each number means with --label-map FILE, "
            f'such as {{"{number}": "{names[number]}"}}'
        )

    @property
    def _counted_names(self) -> Sequence[str]:
        return self.labels if self.known is None else self.known.labels

    def _name(self, label: str | int) -> str:
        written = str(label)
        name = self._named_by_data(label)
        concept = self._mapped(written, name)
        if concept is None:
            concept = self._unmapped(self._in_one_form(name), is_number=_NUMBER.fullmatch(name) is not None)
        if (number := self._number(written, name)) is not None:
            self._numbers[concept] = min(number, self._numbers.get(concept, number))
        return concept

    def _in_one_form(self, name: str) -> str:
        """As the model writes the name, or in Unicode's composed form (NFC) if it does not know it."""
        composed = unicodedata.normalize("NFC", name)
        if name in self.labels:
            return name
        return next((label for label in self.labels if unicodedata.normalize("NFC", label) == composed), composed)

    def _named_by_data(self, label: str | int) -> str:
        if self.names is None or isinstance(label, str):
            return str(label)
        if not 0 <= label < len(self.names):
            raise LabelError(f"has class number {label}, but the data name only 0 to {len(self.names) - 1}")
        return self.names[label]

    def _mapped(self, written: str, name: str) -> str | None:
        found = {self.label_map[each] for each in (written, name) if each in self.label_map}
        if len(found) > 1:
            raise LabelError(
                f"has class number {written}, which is {name!r}; the label map has both, with different names: "
                f"{self.label_map[written]!r} and {self.label_map[name]!r}"
            )
        return found.pop() if found else None

    def _unmapped(self, name: str, is_number: bool) -> str:
        if name in self.labels:
            if is_number and self.known is not None and 0 <= int(name) < len(self.known.labels):
                raise LabelError(
                    f"has label {name}, which may be the model's label {name!r} or class {name} of the data set, "
                    f"{self.known.labels[int(name)]!r}: leave out --dataset, or say which with --label-map FILE"
                )
            return name
        if self.known is not None:
            concept = self._at(int(name)) if is_number else self.known.concept(name)
            # the model may call it otherwise, as "negative" for "neg"
            return next((label for label in self.labels if self.known.concept(label) == concept), concept)
        if not is_number or not self.labels:
            return name
        if any(_NUMBER.fullmatch(label) for label in self.labels):
            raise LabelError(
                f"has label {name}, but the model's labels are {', '.join(self.labels)}: "
                "say what it means with --label-map FILE"
            )
        return self._at(int(name))

    def _at(self, number: int) -> str:
        names = self._counted_names
        if not 0 <= number < len(names):
            raise LabelError(
                f"has label {number}, but class numbers go from 0 ({names[0]}) to {len(names) - 1} ({names[-1]}): "
                "say what each number means with --label-map FILE"
            )
        return self.counted.setdefault(number, names[number])

    def _number(self, written: str, name: str) -> int | None:
        """The class number that orders a concept."""
        if _NUMBER.fullmatch(written):
            return int(written)
        if self.known is not None and (concept := self.known.concept(name)) in self.known.labels:
            return self.known.labels.index(concept)
        return None
