"""What generators of clients need of the OpenAPI document; `tests/e2e/test_generated_clients.py` runs two of them."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.app.openapi import openapi, operations

BODIES = {
    f"{method} {path}": operation["requestBody"]["content"]["application/json"]["schema"]
    for (method, path), operation in operations().items()
    if "requestBody" in operation
}


def parts(part: Any) -> Iterator[dict[str, Any]]:
    """Every object of a document, but for examples, which hold what they like."""
    if isinstance(part, dict):
        yield part
        for name, each in part.items():
            if name != "examples":
                yield from parts(each)
    elif isinstance(part, list):
        for each in part:
            yield from parts(each)


def repeated(names: list[str]) -> list[str]:
    """Names that a generator makes the same identifier of: it looks at letters and digits, and not at their case."""
    found = Counter(re.sub(r"[^a-z0-9]", "", name.lower()) for name in names)
    return [name for name, times in found.items() if times > 1]


def test_no_two_names_become_one_identifier() -> None:
    for part in parts(openapi()):
        if isinstance(part.get("enum"), list):
            assert not repeated([each for each in part["enum"] if isinstance(each, str)]), part["enum"]
        if isinstance(part.get("properties"), dict):
            assert not repeated(list(part["properties"])), list(part["properties"])
    assert not repeated(list(openapi()["components"]["schemas"]))
    assert not repeated([each["operationId"] for each in operations().values()])


@pytest.mark.parametrize("call", BODIES)
def test_every_body_has_examples_that_it_describes(call: str) -> None:
    components = openapi()["components"]["schemas"]
    (name,) = re.findall(r"#/components/schemas/(\w+)", str(BODIES[call]))
    examples = components[name]["examples"]
    assert examples
    for example in examples:
        jsonschema.validate(example, BODIES[call] | {"components": openapi()["components"]})
        unknown = set(example) - set(components[name]["properties"])
        assert not unknown
