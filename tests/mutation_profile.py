"""A pytest plugin for mutation tests: the same hypothesis examples for every mutant, and less work per process."""

import gc

from hypothesis import Phase, settings

settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection, which would copy the memory that forked processes share."""
    gc.freeze()
