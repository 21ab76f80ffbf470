"""Versioned prompt templates: instruction, exemplars, and one string per label."""

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from range_store.domain.erasure import FrozenModel
from workers.models.errors import CheckpointError

TEMPLATES = Path(__file__).parent / "templates"
"""Built-in templates, `NAME.vVERSION.json`. A published one never changes: a change is a new version."""

Text = Annotated[str, Field(min_length=1)]


class LabelText(FrozenModel):
    """A label, and the string that the model must produce for it right after `after_text`."""

    label: Text
    text: Text


class Exemplar(FrozenModel):
    """An example: a text with its label."""

    text: Text
    label: Text


class PromptTemplate(FrozenModel):
    """A prompt: instruction, exemplars, and the text to classify, joined by `between`.

    An exemplar is before_text, its text, after_text and its label's string; the text to classify lacks the label.
    """

    name: Text
    version: Annotated[int, Field(ge=1)]
    instruction: str
    before_text: str
    after_text: Text
    between: str = "\n\n"
    labels: Annotated[tuple[LabelText, ...], Field(min_length=2)]
    exemplars: tuple[Exemplar, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "PromptTemplate":
        names = [each.label for each in self.labels]
        for what, values in (("label", names), ("label text", [each.text for each in self.labels])):
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"the {what} {twice!r} occurs twice")
        seen: dict[str, str] = {}
        for text in (each.text for each in self.labels):
            if (same := seen.setdefault(text.strip().casefold(), text)) != text:  # greedy scoring ignores both
                raise ValueError(f"the label texts {text!r} and {same!r} differ only in case or spaces")
        for exemplar in self.exemplars:
            if exemplar.label not in names:
                raise ValueError(f"an exemplar has the label {exemplar.label!r}; expected one of {', '.join(names)}")
        return self

    @cached_property
    def _text_of(self) -> dict[str, str]:
        return {each.label: each.text for each in self.labels}

    def prefix(self) -> str:
        """Everything before the text to classify."""
        examples = [
            f"{self.before_text}{exemplar.text}{self.after_text}{self._text_of[exemplar.label]}"
            for exemplar in self.exemplars
        ]
        return self.between.join([*([self.instruction] if self.instruction else []), *examples, self.before_text])

    @property
    def id(self) -> str:
        """Name and version, as "ag_news@1"."""
        return f"{self.name}@{self.version}"


def load_template(name: str) -> PromptTemplate:
    """A built-in template by name ("ag_news": the newest version, "ag_news@1": that one), or one from a JSON file.

    Raises:
        CheckpointError: no template has that name, or the file is not a valid template.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        return _read(path)
    wanted, _, version = name.partition("@")
    versions = {
        int(file.stem.rpartition(".v")[2]): file
        for file in TEMPLATES.glob("*.json")
        if file.stem.rpartition(".v")[0] == wanted
    }
    if not versions or (version and (not version.isdigit() or int(version) not in versions)):
        known = sorted({file.stem.replace(".v", "@") for file in TEMPLATES.glob("*.json")})
        raise CheckpointError(f"no prompt template {name!r}: use a JSON file, or one of {', '.join(known)}")
    return _read(versions[int(version) if version else max(versions)])


def _read(path: Path) -> PromptTemplate:
    try:
        return PromptTemplate.model_validate(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        if isinstance(error, ValidationError) and (place := error.errors(include_url=False)[0]["loc"]):
            reason = f"{'.'.join(map(str, place))}: {reason}"
        raise CheckpointError(f"{path} is not a valid prompt template: {reason}") from None
