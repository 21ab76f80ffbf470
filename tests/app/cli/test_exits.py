"""Every expected error has an exit code, and no other error has."""

import pkgutil
from importlib import import_module

import pytest
import typer

import workers
from app.cli.exits import MEANINGS, CommandError, exit_code_of
from app.errors import COMMAND_ERRORS, ERRORS
from range_store import errors


def test_every_named_class_exists() -> None:
    for name in (*COMMAND_ERRORS, *(name for kind in ERRORS for name in kind.classes)):
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(import_module(module), kind), BaseException), name


def test_every_documented_code_is_used() -> None:
    used = {*COMMAND_ERRORS.values(), *(kind.exit_code for kind in ERRORS)}
    assert used | {0} == set(MEANINGS)


def test_every_error_of_store_and_workers_has_an_exit_code() -> None:
    """An error without an exit code would show users a traceback."""
    modules = [errors] + [
        import_module(found.name) for found in pkgutil.walk_packages(workers.__path__, "workers.") if not found.ispkg
    ]
    for module in modules:
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == module.__name__:
                assert exit_code_of(kind.__new__(kind)) is not None, f"{module.__name__}.{name}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFitted("layer", [3], [5]), 2),
        (errors.StoreUnavailable("gone"), 3),
        (errors.UnknownConcept("Weather", ["World"]), 4),
        (errors.StaleGeneration("a", "b"), 4),
        (errors.InvalidRangeSet("corrupt"), 1),
        (FileNotFoundError(2, "No such file"), 1),
        (CommandError("told", 3), 3),
        (typer.Abort(), 130),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError(), None),
        (ValueError("a bug"), None),
    ],
)
def test_the_nearest_class_decides_the_exit_code(error: BaseException, code: int | None) -> None:
    assert exit_code_of(error) == code
