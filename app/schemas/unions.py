"""Fields that take several forms, which are distinguished by their JSON type.

Without a discriminator, pydantic tries every form and reports the errors of all of them: a wrong `tau` in one form of
`erase` would come with errors about every other form. It would also validate a long list of the wrong type.
"""

from typing import Any

from pydantic import Discriminator, Tag

TEXT, LIST, OBJECT, NUMBER = Tag("<text>"), Tag("<list>"), Tag("<object>"), Tag("<number>")
_TAGS = {str: TEXT.tag, list: LIST.tag, dict: OBJECT.tag, int: NUMBER.tag}


def by_shape(expected: str) -> Discriminator:
    """A discriminator by JSON type; `expected` describes the accepted forms in the error message."""
    return Discriminator(
        lambda value: _TAGS.get(type(value)),
        custom_error_type="shape",
        custom_error_message=f"Input should be {expected}",
    )


def without_tags(location: tuple[Any, ...]) -> list[str | int]:
    """The location of an error in what the client sent: field names and indices, without names of forms."""
    return [part for part in location if part not in _TAGS.values()]
