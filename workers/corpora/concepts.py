"""From a label in the data to the name of a concept: one rule for every command and every kind of file."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.corpora.errors import CorpusError
from workers.corpora.paper_datasets import PaperDataset

_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
"""How a class number is written; "01" is a name like any other."""


class LabelError(CorpusError):
    """A label without a meaning, or with two. The message is to follow the location of the row."""


@dataclass
class ConceptNames:
    """Names the concept of each label.

    Labels are compared as they are written, so a number in JSON and the same number in CSV are one label. Names that
    differ only in their Unicode form look alike, and are one concept. The first rule that applies decides:

    1. The label map has the label, or the class name that it stands for in the data.
    2. The data name their class numbers: the concept is the name of the number.
    3. The model has a label of that name.
    4. The data set is one of the paper's: its class numbers and aliases stand for its classes.
    5. The label is a class number, counted from 0, and no label of the model is a number.
    6. The concept has the name of the label, and the model does not know it.

    Attributes:
        labels: those of the model; empty if it is still to be trained.
        class_names: names of class numbers, if the data have them.
        positional: class numbers seen so far that only their position names, and their concepts.
    """

    labels: Sequence[str] = ()
    class_names: Sequence[str] | None = None
    label_map: Mapping[str, str] = field(default_factory=dict)
    dataset: PaperDataset | None = None
    positional: dict[int, str] = field(default_factory=dict, init=False)
    _names: dict[str | int, str] = field(default_factory=dict, init=False)
    _numbers: dict[str, int] = field(default_factory=dict, init=False)
    """The smallest class number of each concept that has one."""

    def name(self, label: Any) -> str:
        """The concept of a label. Raises LabelError."""
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise LabelError("has no label (a name or a whole number)")
        concept = self._names.get(label)
        if concept is None:
            concept = self._names[label] = self._name(label)
        return concept

    def sort(self, concepts: Iterable[str]) -> tuple[str, ...]:
        """The model's labels in their order, then concepts with class numbers by number, then others by name."""
        positions = {label: position for position, label in enumerate(self.labels)}

        def key(concept: str) -> tuple[int, int, str]:
            if concept in positions:
                return 0, positions[concept], ""
            return (1, self._numbers[concept], concept) if concept in self._numbers else (2, 0, concept)

        return tuple(sorted(concepts, key=key))

    def ambiguity(self) -> str | None:
        """Why class numbers may count from 0 or from 1, where none of them is 0; None if they are clear."""
        if not self.positional or 0 in self.positional:
            return None
        number = min(self.positional)
        names = self._position_names
        return (
            f"the smallest class number is {number}, which means {names[number]!r} if classes are counted from 0, but "
            f"{names[number - 1]!r} if they are counted from 1: say what each number means with --label-map FILE, "
            f'such as {{"{number}": "{names[number]}"}}'
        )

    @property
    def _position_names(self) -> Sequence[str]:
        return self.labels if self.dataset is None else self.dataset.labels

    def _name(self, label: str | int) -> str:
        written = str(label)
        name = self._class_name(label)
        concept = self._mapped(written, name)
        if concept is None:
            concept = self._unmapped(self._normalized(name), is_number=_NUMBER.fullmatch(name) is not None)
        if (number := self._class_number(written, name)) is not None:
            self._numbers[concept] = min(number, self._numbers.get(concept, number))
        return concept

    def _normalized(self, name: str) -> str:
        """The name as the model writes it, or in Unicode's composed form (NFC) if the model does not have it."""
        composed = unicodedata.normalize("NFC", name)
        if name in self.labels:
            return name
        return next((label for label in self.labels if unicodedata.normalize("NFC", label) == composed), composed)

    def _class_name(self, label: str | int) -> str:
        if self.class_names is None or isinstance(label, str):
            return str(label)
        if not 0 <= label < len(self.class_names):
            raise LabelError(f"has class number {label}, but the data name only 0 to {len(self.class_names) - 1}")
        return self.class_names[label]

    def _mapped(self, written: str, name: str) -> str | None:
        found = {self.label_map[each] for each in (written, name) if each in self.label_map}
        if len(found) > 1:
            raise LabelError(
                f"has class number {written}, which is {name!r}; the label map has both, with different names: "
                f"{self.label_map[written]!r} and {self.label_map[name]!r}"
            )
        return found.pop() if found else None

    def _unmapped(self, name: str, is_number: bool) -> str:
        dataset = self.dataset
        if name in self.labels:
            if is_number and dataset is not None and 0 <= int(name) < len(dataset.labels):
                raise LabelError(
                    f"has label {name}, which may be the model's label {name!r} or class {name} of the data set, "
                    f"{dataset.labels[int(name)]!r}: leave out --dataset, or say which with --label-map FILE"
                )
            return name
        if dataset is not None:
            concept = self._at_position(int(name)) if is_number else dataset.class_of(name)
            # the model may have another name for the class, such as "negative" for "neg"
            return next((label for label in self.labels if dataset.class_of(label) == concept), concept)
        if not is_number or not self.labels:
            return name
        if any(_NUMBER.fullmatch(label) for label in self.labels):
            raise LabelError(
                f"has label {name}, but the model's labels are {', '.join(self.labels)}: "
                "say what it means with --label-map FILE"
            )
        return self._at_position(int(name))

    def _at_position(self, number: int) -> str:
        names = self._position_names
        if not 0 <= number < len(names):
            raise LabelError(
                f"has label {number}, but class numbers go from 0 ({names[0]}) to {len(names) - 1} ({names[-1]}): "
                "say what each number means with --label-map FILE"
            )
        return self.positional.setdefault(number, names[number])

    def _class_number(self, written: str, name: str) -> int | None:
        """The class number that a concept is sorted by."""
        if _NUMBER.fullmatch(written):
            return int(written)
        if self.dataset is not None and (concept := self.dataset.class_of(name)) in self.dataset.labels:
            return self.dataset.labels.index(concept)
        return None
