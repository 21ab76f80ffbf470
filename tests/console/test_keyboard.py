"""The keyboard alone operates every part: Tab reaches everything, and nothing takes the focus away."""

import pytest
from playwright.sync_api import expect

from tests.console.conftest import OpenWindow, tab_to
from tests.servers import RunningServer

pytestmark = pytest.mark.system


def test_keyboard_operates_try(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open()
    press = page.keyboard.press
    tab_to(page, page.get_by_label("Text", exact=True))
    page.keyboard.type("the keeper saved a penalty")
    tab_to(page, page.get_by_role("group", name="Examples").get_by_role("button").first)
    press("Enter")
    expect(page.locator(".scores")).to_be_visible()
    tab_to(page, page.get_by_label("Sports"))
    press("Space")
    expect(page.locator(".result")).to_contain_text("masked at the read position")
    tab_to(page, page.get_by_role("radio", name="Range"))
    press("ArrowRight")
    expect(page.get_by_role("radio", name="Neuron")).to_be_checked()
    tab_to(page, page.get_by_label("Share of neurons"))
    press("End")
    expect(page.locator(".result")).to_contain_text("32 neurons masked")
    press("ArrowLeft")
    expect(page.locator(".result")).to_contain_text("31 neurons masked")
    expect(page.get_by_label("Share of neurons")).to_be_focused()
    tab_to(page, page.locator(".result summary"))
    press("Enter")
    expect(page.locator(".result li")).to_be_visible()
    tab_to(page, page.get_by_role("button", name="Copy link"))


def test_keyboard_operates_neurons(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/neurons")
    press = page.keyboard.press
    caption = page.locator(".ranked caption")
    expect(caption).to_contain_text("Neurons of World")
    tab_to(page, page.get_by_label("Concept", exact=True))
    press("ArrowDown")
    expect(caption).to_contain_text("Neurons of Sports")
    tab_to(page, page.get_by_label("τ", exact=True))
    press("Home")
    expect(page.get_by_text("Range, ±0 σ")).to_be_visible()
    next_page = page.get_by_role("button", name="Next")
    tab_to(page, next_page)
    press("Enter")
    expect(page.locator(".ranked tbody th").first).to_have_text("13")
    expect(next_page).to_be_focused()
    chosen = page.locator(".ranked [data-neuron]").nth(2)
    tab_to(page, chosen)
    press("Enter")
    expect(chosen).to_have_attribute("aria-pressed", "true")
    region = page.get_by_role("region", name="One neuron")
    expect(region.get_by_role("heading", name=f"Neuron {chosen.inner_text()} of block")).to_be_visible()
    numbers = region.get_by_text("Show as a table")
    tab_to(page, numbers)
    press("Enter")
    expect(region.get_by_role("cell").first).to_be_visible()
    page.get_by_label("τ", exact=True).fill("1")  # the numbers change, and stay open
    expect(region).to_contain_text("±")
    expect(region.get_by_role("cell").first).to_be_visible()


def test_keyboard_operates_evaluation(server_with_report: RunningServer, window: OpenWindow) -> None:
    page = window(server_with_report).open("#/evaluation")
    opener = page.get_by_role("button", name="Open tiny")
    tab_to(page, opener)
    page.keyboard.press("Enter")
    expect(page.frame_locator("iframe").locator("h1")).to_be_visible()
    tab_to(page, page.get_by_role("button", name="Close"))
    page.keyboard.press("Enter")
    expect(page.locator("iframe")).to_have_count(0)
    expect(opener).to_be_focused()


def test_keyboard_operates_live(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/try")
    expect(page.get_by_label("Text")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.get_by_role("link", name="Live").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Switch on…")).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Switch an erasure on")
    expect(dialog.get_by_label("Concept")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Switch on…")).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog.get_by_label("Concept")).to_be_focused()
    tab_to(page, dialog.get_by_label("Reason"))
    page.keyboard.type("by hand")
    page.keyboard.press("Enter")
    expect(page.get_by_text("by hand")).to_be_visible()
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Change World").focus()
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("dialog", name="Change World")).to_be_visible()
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Change it for everybody").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Change World")).to_be_focused()
