"""Pages that name things of the code are held against the code."""

from pathlib import Path

from workers.models.families import FAMILIES

ROOT = Path(__file__).parents[2]


def test_models_page_lists_every_family() -> None:
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    for name, family in FAMILIES.items():
        reads = "first token" if family.reads == "first" else "last real token"
        assert f"| `{name}` | `{family.blocks}` | {reads} |" in page
