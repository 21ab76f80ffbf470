"""Every part says what it is loading until it is there."""

import pytest
from playwright.sync_api import expect

from tests.console.conftest import OpenWindow, unanswered
from tests.servers import RunningServer

pytestmark = pytest.mark.system


def test_each_part_names_what_it_loads(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    for address, pattern, notice, content in (
        ("#/try", "**/v1/models", "what this server has", "Nothing to classify yet"),
        ("#/live", "**/v1/{erasures,events}", "what is live", "Nothing is erased"),
        ("#/live", "**/v1/range-sets", "range sets", "Provenance"),
        ("#/neurons", "**/v1/concepts/*/ranges*", "neurons", "Saliency"),
        ("#/neurons", "**/v1/neurons/**", "the neuron", "Distribution of the texts of each concept"),
        ("#/neurons", "**/v1/overlap*", "the overlap", "The share of a concept"),
        ("#/evaluation", "**/v1/reports", "reports", "No reports yet"),
    ):
        opened.page.goto("about:blank")  # a new fragment alone does not load the page again
        with unanswered(opened.page, pattern):
            main = opened.open(address).locator("main")
            loading = main.get_by_role("status").filter(has_text=f"Loading {notice}…")
            expect(loading).to_be_visible()
            expect(main).not_to_contain_text(content)
        expect(main).to_contain_text(content)
        expect(loading).to_have_count(0)


def test_outdated_result_is_marked_and_stays_readable(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/try?text=a+goal&erase=Sports")
    expect(page.locator(".scores")).to_be_visible()
    with unanswered(page, "**/v1/classify"):
        page.get_by_label("Share of neurons").fill("100")
        expect(page.locator(".result.busy .scores")).to_be_visible()
        assert page.locator(".result").evaluate("(result) => getComputedStyle(result).opacity") == "1"
    expect(page.locator(".result.busy")).to_have_count(0)
    with unanswered(page, "**/v1/classify"):
        page.get_by_label("Share of neurons").fill("50")
        expect(page.locator(".result.busy")).to_be_visible()
        page.get_by_label("Text").fill("")
        expect(page.get_by_text("Nothing to classify yet")).to_be_visible()
        expect(page.locator(".result.busy")).to_have_count(0)


def test_opened_report_says_that_it_loads(server_with_report: RunningServer, window: OpenWindow) -> None:
    page = window(server_with_report).open("#/evaluation")
    with unanswered(page, "**/v1/reports/**"):
        page.get_by_role("button", name="Open tiny").click()
        expect(page.get_by_role("status").filter(has_text="Loading the report…")).to_be_visible()
    expect(page.frame_locator("iframe").locator("h1")).to_be_visible()
