"""The OpenAPI document of the application, generated once per test process."""

import functools
from typing import Any

from app.main import create_app
from app.settings import Settings


@functools.cache
def openapi() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """Every operation by method and path."""
    return {
        (method.upper(), path): operation
        for path, methods in openapi()["paths"].items()
        for method, operation in methods.items()
    }
