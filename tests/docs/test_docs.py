"""Pages that list parts of the code list all of them."""

import json
import re
from pathlib import Path

import pytest

from app.errors import ERRORS
from app.observability.logs import FIELDS
from app.settings import settings_table
from tests.app.openapi import openapi
from workers.models.families import FAMILIES

ROOT = Path(__file__).parents[2]


def test_models_page_lists_every_family() -> None:
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    for name, family in FAMILIES.items():
        reads = "first token" if family.reads == "first" else "last real token"
        assert f"| `{name}` | `{family.blocks}` | {reads} |" in page


def test_configuration_page_lists_every_setting() -> None:
    assert settings_table() in (ROOT / "docs" / "configuration.md").read_text("utf-8")


def test_nothing_tells_to_install_neuronlens_by_name() -> None:
    """In the package index that name belongs to another project."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docker").rglob("*.*")]
    files += [ROOT / "clients" / "python" / "README.md"]
    files += [
        file for package in ("app", "clients", "range_store", "workers") for file in (ROOT / package).rglob("*.py")
    ]
    for file in files:
        assert not re.search(r"pip install [^\n`]*\bneuronlens", file.read_text("utf-8")), file


def test_the_overview_of_the_http_page_lists_exactly_the_routes_of_this_protocol() -> None:
    """Routes of other protocols are in the table of scopes, which tests/app/test_auth.py compares."""
    page = (ROOT / "docs" / "http.md").read_text("utf-8")
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", page[: page.index("`erase` in")], re.MULTILINE)
    listed = set(re.findall(r"`(?:[A-Z]+ )?(/v1/[^` ]*)`", " ".join(cells)))
    assert listed == {path for path in openapi()["paths"] if path.startswith("/v1/")}


def test_http_page_lists_every_error_code() -> None:
    page = (ROOT / "docs" / "http.md").read_text("utf-8")
    for kind in ERRORS:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {kind.status} |")]
        assert f"`{kind.code}`" in row, kind.code


def test_openapi_describes_each_operation_and_has_no_unused_schema() -> None:
    document = openapi()
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["description"].startswith(operation["summary"])
    referred = set(re.findall(r"#/components/schemas/([^\"]+)", json.dumps(document)))
    assert referred == set(document["components"]["schemas"])


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        str(path.relative_to(ROOT))
        for folder in (".", "docs", "docker", "clients/python")
        for path in (ROOT / folder).glob("*.md")
    ],
)
def test_links_between_pages_have_a_target(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_observing_page_lists_every_field_of_a_log_line() -> None:
    page = (ROOT / "docs" / "observing.md").read_text("utf-8")
    assert "\n".join(f"| `{name}` | {meaning} |" for name, meaning in FIELDS.items()) in page
    (line,) = re.findall(r"```json\n(.+)\n```", page)
    example = json.loads(line)
    assert list(example) == [name for name in FIELDS if name in example]
