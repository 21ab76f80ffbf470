"""A pytest plugin for mutation tests: the same hypothesis examples for every mutant, and less work per process."""

import gc

import pytest
from hypothesis import Phase, settings

settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a thread come last: most mutants that they would wait for in vain fail another test first."""
    items.sort(key=lambda item: isinstance(item, pytest.Function) and hasattr(item.module, "until"))


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection, which would copy the memory that forked processes share."""
    gc.freeze()
