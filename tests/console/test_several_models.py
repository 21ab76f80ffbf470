"""A server of several models: one is chosen, kept in the address, and everything on the page is about it."""

import re
from collections.abc import Callable
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Window
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]


def chooser(page: Page) -> object:
    return page.get_by_role("combobox", name="Model", exact=True)


def test_one_is_chosen_and_everything_is_about_it(two_models: RunningServer, window: Open) -> None:
    one, other = (service.name for service in two_models.services)
    mine = window(two_models)
    page, following = mine.open("#/live"), window(two_models).open(f"?model={quote(other)}#/live")
    expect(chooser(page)).to_have_value(one)
    expect(chooser(following)).to_have_value(other)
    expect(following.locator("#connection")).to_have_text("following")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "model=" in page.url else None)

    chooser(page).select_option(other)
    page.wait_for_url(f"**/?model={quote(other)}#/live")
    expect(chooser(page)).to_have_value(other)
    page.get_by_role("button", name="Switch on…").click()
    box = page.get_by_role("dialog", name="Switch an erasure on")
    assert box.get_by_label("Concept").locator("option").all_inner_texts() == ["Cats", "Dogs", "Sports"]
    box.get_by_label("Concept").select_option("Sports")
    box.get_by_role("button", name="Switch it on for everybody").click()
    for each in (page, following):
        expect(each.get_by_role("heading", name="Sports")).to_be_visible()
    erased = [two_models.http.get("/v1/erasures", params={"model": name}).json()["erasures"] for name in (one, other)]
    assert [len(each) for each in erased] == [0, 1]

    page.get_by_role("link", name="Try").click()
    page.get_by_label("Text", exact=True).fill("a cat sat on the mat")
    expect(page.locator(".result")).to_contain_text("Dogs")
    expect(chooser(page)).to_have_value(other)
    calls = [url for url in asked if "/v1/" in url and not url.endswith("/v1/models")]
    assert {f"model={quote(other)}" in url for url in calls} == {True}, calls

    page.wait_for_url(re.compile("text=a"))
    chooser(page).select_option(one)
    page.wait_for_url(re.compile(rf"model={re.escape(quote(one))}#/try"))
    expect(page.get_by_label("Text", exact=True)).to_have_value("a cat sat on the mat")
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()


def test_with_one_model_there_is_nothing_to_choose(server: RunningServer, window: Open) -> None:
    page = window(server).open("#/live")
    expect(page.locator("#model")).to_have_text(server.service.name)
    expect(chooser(page)).to_have_count(0)


def test_a_model_that_is_not_served_can_be_left(two_models: RunningServer, window: Open) -> None:
    page = window(two_models).open("?model=gone#/neurons")
    expect(page.get_by_text("no such model").first).to_be_visible()
    chooser(page).select_option(two_models.services[1].name)
    expect(page.get_by_text("no such model")).to_have_count(0)
    expect(chooser(page)).to_have_value(two_models.services[1].name)
