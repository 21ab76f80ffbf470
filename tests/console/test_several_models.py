"""A server of several models: the address keeps the chosen model, and the whole page is about it."""

import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.console.conftest import OpenWindow
from tests.servers import RunningServer

pytestmark = pytest.mark.system


def model_selector(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Model", exact=True)


def test_whole_page_is_about_the_chosen_model(two_models: RunningServer, window: OpenWindow) -> None:
    first, second = (service.name for service in two_models.services)
    page, other_page = window(two_models).open("#/live"), window(two_models).open(f"?model={quote(second)}#/live")
    expect(model_selector(page)).to_have_value(first)
    expect(model_selector(other_page)).to_have_value(second)
    expect(other_page.locator("#connection")).to_have_text("following")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url) if "model=" in page.url else None)

    model_selector(page).select_option(second)
    page.wait_for_url(f"**/?model={quote(second)}#/live")
    expect(model_selector(page)).to_have_value(second)
    page.get_by_role("button", name="Switch on…").click()
    dialog = page.get_by_role("dialog", name="Switch an erasure on")
    assert dialog.get_by_label("Concept").locator("option").all_inner_texts() == ["Cats", "Dogs", "Sports"]
    dialog.get_by_label("Concept").select_option("Sports")
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    for each in (page, other_page):
        expect(each.get_by_role("heading", name="Sports")).to_be_visible()
    erased = [
        two_models.http.get("/v1/erasures", params={"model": name}).json()["erasures"] for name in (first, second)
    ]
    assert [len(each) for each in erased] == [0, 1]

    page.get_by_role("link", name="Try").click()
    page.get_by_label("Text", exact=True).fill("a cat sat on the mat")
    expect(page.locator(".result")).to_contain_text("Dogs")
    expect(model_selector(page)).to_have_value(second)
    calls = [url for url in requests if "/v1/" in url and not url.endswith("/v1/models")]
    assert {f"model={quote(second)}" in url for url in calls} == {True}, calls

    page.wait_for_url(re.compile("text=a"))
    model_selector(page).select_option(first)
    page.wait_for_url(re.compile(rf"model={re.escape(quote(first))}#/try"))
    expect(page.get_by_label("Text", exact=True)).to_have_value("a cat sat on the mat")
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()


def test_single_model_has_no_selector(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/live")
    expect(page.locator("#model")).to_have_text(server.service.name)
    expect(model_selector(page)).to_have_count(0)


def test_unknown_model_in_the_address_can_be_replaced(two_models: RunningServer, window: OpenWindow) -> None:
    page = window(two_models).open("?model=gone#/neurons")
    expect(page.get_by_text("no such model").first).to_be_visible()
    model_selector(page).select_option(two_models.services[1].name)
    expect(page.get_by_text("no such model")).to_have_count(0)
    expect(model_selector(page)).to_have_value(two_models.services[1].name)
