"""axe finds no serious fault on any part and in any state of it, in light and dark, wide and narrow."""

from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Route, expect

from range_store.api_keys import KeyStore
from tests.console.conftest import NARROW, WIDE, Window
from tests.e2e.fits.conftest import LONG, fitting, started, texts  # noqa: F401  fixtures
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer, with_ranges
from workers.fitting.fit import Fitted

pytestmark = pytest.mark.system
Open = Callable[..., Window]

PARTS = {
    "#/try": "Nothing to classify yet",
    "#/try?text=a+goal+in+the+last+minute&erase=Sports": "masked at the read position",
    "#/live": "since",
    "#/neurons": "Which part of a concept",
    "#/evaluation": "Reports",
}
LOOKS = [
    pytest.param({"color_scheme": scheme, "viewport": size, "reduced_motion": "reduce"}, id=f"{scheme}-{name}")
    for scheme in ("light", "dark")
    for name, size in (("wide", WIDE), ("narrow", NARROW))
]
Look = dict[str, object]


def check(window: Window, where: str) -> None:
    found = Axe().run(window.page).response["violations"]
    serious = [
        f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']][:3]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious, (where, serious)


@pytest.mark.parametrize("look", LOOKS)
def test_no_serious_fault(server: RunningServer, window: Open, look: Look) -> None:
    server.http.put("/v1/erasures/Business", json={"reason": "why not", "enforced": True})
    mine = window(server, **look)
    for address, words in PARTS.items():
        page = mine.open(address)
        page.reload()  # the part after # alone loads nothing anew
        expect(page.locator("main")).to_contain_text(words)
        if "neurons" in address:
            expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
        for summary in page.locator("main summary").all():
            summary.click()
        check(mine, address)
    mine.open("#/live").get_by_role("button", name="Change Business").click()
    expect(mine.page.get_by_role("dialog")).to_be_visible()
    check(mine, "dialog")


@pytest.mark.parametrize("look", LOOKS)
def test_nor_where_something_is_wrong_or_on_its_way(server: RunningServer, window: Open, look: Look) -> None:
    mine = window(server, **look)
    page = mine.page
    refusal = '{"code": "store_unavailable", "detail": "the store is away", "status": 503, "request_id": "abc"}'
    page.route("**/v1/events", lambda route: route.fulfill(status=404, body="{}"))
    page.route("**/v1/range-sets", lambda route: route.fulfill(status=503, body=refusal))
    mine.open("#/live")
    expect(page.get_by_role("alert").filter(has_text="the store is away")).to_be_visible()
    check(mine, "an error")

    held: list[Route] = []
    page.route("**/v1/neurons/**", lambda route: held.append(route))
    page.get_by_role("link", name="Neurons").click()
    expect(page.get_by_text("Loading the neuron")).to_be_visible()
    expect(page.locator(".ranked")).to_be_visible()
    check(mine, "loading")

    mine.away = True
    page.context.set_offline(True)
    page.get_by_role("link", name="Evaluation").click()
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("main .problem")).to_be_visible()
    check(mine, "lost")


@pytest.mark.parametrize("look", LOOKS)
def test_nor_where_a_key_is_asked_for(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], window: Open, look: Look
) -> None:
    mine = window(server_with_keys[0], **look)
    expect(mine.open("#/live").get_by_role("dialog", name="API key")).to_be_visible()
    check(mine, "key")


@pytest.mark.parametrize("look", LOOKS)
def test_nor_on_a_server_without_ranges_with_a_fit_under_way(
    fitting: RunningServer,  # noqa: F811
    window: Open,
    look: Look,
) -> None:
    job = started(fitting.http, LONG | {"batch_tokens": 64})["id"]
    mine = window(fitting, **look)
    for address, words in {
        "#/live": "news/long.jsonl",
        "#/try": "None are known",
        "#/neurons": "No range set is active",
        "#/evaluation": "No reports yet",
    }.items():
        expect(mine.open(address).locator("main")).to_contain_text(words)
        check(mine, f"{address} of an empty server")
    assert fitting.http.delete(f"/v1/jobs/{job}").status_code in (200, 409)  # 409: it is over already


@pytest.mark.parametrize("look", LOOKS)
def test_nor_with_two_range_sets_compared_and_a_report_opened(
    start_server: Callable[..., RunningServer], fitted: Fitted, report: Path, window: Open, look: Look
) -> None:
    running = with_ranges(start_server(reports_dir=report), fitted)
    identity = running.service.model.identity
    other = random_range_set(7, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    running.service.store.publish(*other)
    mine = window(running, **look)
    page = mine.open("#/live")
    expect(page.get_by_label("Compare")).to_have_count(2)
    for box in page.get_by_label("Compare").all():
        box.check()
    page.get_by_text("Provenance", exact=True).first.click()
    expect(page.get_by_role("region", name="Comparison")).to_be_visible()
    check(mine, "comparison")
    page.get_by_role("link", name="Evaluation").click()
    page.get_by_role("button", name="Open tiny").click()
    expect(page.frame_locator("iframe").locator("h1")).to_be_visible()
    check(mine, "report")
