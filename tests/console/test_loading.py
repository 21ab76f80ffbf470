"""What is on its way says so, on every part, until it is there."""

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.console.conftest import Window, held
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]


@pytest.mark.parametrize(
    ("address", "what", "notice", "then"),
    [
        ("#/try", "**/v1/models", "what this server has", "Nothing to classify yet"),
        ("#/live", "**/v1/{erasures,events}", "what is live", "Nothing is erased"),
        ("#/live", "**/v1/range-sets", "range sets", "Provenance"),
        ("#/neurons", "**/v1/concepts/*/ranges*", "neurons", "Saliency"),
        ("#/neurons", "**/v1/neurons/**", "the neuron", "How the texts of each concept spread"),
        ("#/neurons", "**/v1/overlap*", "the overlap", "Which part of a concept"),
        ("#/evaluation", "**/v1/reports", "reports", "No reports yet"),
    ],
)
def test_it_says_what_it_waits_for(
    server: RunningServer, window: Open, address: str, what: str, notice: str, then: str
) -> None:
    mine = window(server)
    with held(mine.page, what):
        main = mine.open(address).locator("main")
        loading = main.get_by_role("status").filter(has_text=f"Loading {notice}…")
        expect(loading).to_be_visible()
        expect(main).not_to_contain_text(then)
    expect(main).to_contain_text(then)
    expect(loading).to_have_count(0)


def test_a_result_that_takes_long_is_marked_and_can_still_be_read(server: RunningServer, window: Open) -> None:
    page = window(server).open("#/try?text=a+goal&erase=Sports")
    expect(page.locator(".scores")).to_be_visible()
    with held(page, "**/v1/classify"):
        page.get_by_label("Share of neurons").fill("100")
        expect(page.locator(".result.busy .scores")).to_be_visible()
        assert page.locator(".result").evaluate("(result) => getComputedStyle(result).opacity") == "1"
    expect(page.locator(".result.busy")).to_have_count(0)
    with held(page, "**/v1/classify"):
        page.get_by_label("Share of neurons").fill("50")
        expect(page.locator(".result.busy")).to_be_visible()
        page.get_by_label("Text").fill("")
        expect(page.get_by_text("Nothing to classify yet")).to_be_visible()
        expect(page.locator(".result.busy")).to_have_count(0)


def test_an_opened_report_says_that_it_loads(server: RunningServer, window: Open) -> None:
    folder = server.service.settings.reports / "one"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<!doctype html><title>one</title><h1>One</h1>", "utf-8")
    page = window(server).open("#/evaluation")
    with held(page, "**/v1/reports/**"):
        page.get_by_role("button", name="Open one").click()
        expect(page.get_by_role("status").filter(has_text="Loading the report…")).to_be_visible()
    expect(page.frame_locator("iframe").get_by_role("heading", name="One")).to_be_visible()
