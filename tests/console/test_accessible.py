"""axe finds no serious fault on any part, in light and dark."""

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.console.conftest import Window
from tests.e2e.conftest import Running

pytestmark = pytest.mark.system
Open = Callable[..., Window]

PARTS = {
    "#/try": "Nothing to classify yet",
    "#/try?text=a+goal+in+the+last+minute&erase=Sports": "masked at the read position",
    "#/live": "since",
    "#/neurons": "Which part of a concept",
    "#/evaluation": "Reports",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault(news: Running, window: Open, scheme: str) -> None:
    news.http.put("/v1/erasures/Business", json={"reason": "why not", "enforced": True})
    mine = window(news, color_scheme=scheme, reduced_motion="reduce")
    for address, words in PARTS.items():
        page = mine.open(address)
        page.reload()  # the part after # alone loads nothing anew
        expect(page.locator("main")).to_contain_text(words)
        if "neurons" in address:
            expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
        check(mine, address)
    mine.open("#/live").get_by_role("button", name="Change Business").click()
    expect(mine.page.get_by_role("dialog")).to_be_visible()
    check(mine, "dialog")


def check(window: Window, where: str) -> None:
    found = Axe().run(window.page).response["violations"]
    serious = [
        f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']][:3]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious, (where, serious)
