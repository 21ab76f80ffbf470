"""Writes `openapi.json` at the root of the repository: `python -m app.openapi`. A test keeps it current."""

import json
from pathlib import Path

from app.main import create_app
from app.settings import Settings

PATH = Path(__file__).parents[1] / "openapi.json"


def document() -> str:
    """The OpenAPI document as JSON text."""
    return json.dumps(create_app(Settings()).openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(document(), "utf-8")
