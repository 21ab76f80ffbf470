"""Fields that take several forms, told apart by their JSON type.

Without this, pydantic tries every form and reports what each of them missed: a wrong `tau` in one form of `erase` would
come with complaints about all the others. Telling them apart first gives the one error that counts, and costs no time
on a long list of the wrong thing.
"""

from typing import Any

from pydantic import Discriminator, Tag

TEXT, LIST, OBJECT, NUMBER = Tag("<text>"), Tag("<list>"), Tag("<object>"), Tag("<number>")
_TAGS = {str: TEXT.tag, list: LIST.tag, dict: OBJECT.tag, int: NUMBER.tag}


def by_shape(expected: str) -> Discriminator:
    """Chooses the form of a field by its JSON type; `expected` says what it takes, for whoever sent something else."""
    return Discriminator(
        lambda value: _TAGS.get(type(value)),
        custom_error_type="shape",
        custom_error_message=f"Input should be {expected}",
    )


def without_tags(location: tuple[Any, ...]) -> list[str | int]:
    """Where an error lies as the client wrote it: field names and indices, no names of forms."""
    return [part for part in location if part not in _TAGS.values()]
