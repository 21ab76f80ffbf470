"""A pytest plugin for mutation tests: every mutant meets the same hypothesis examples, and a failing one is enough."""

from hypothesis import Phase, settings

settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)
