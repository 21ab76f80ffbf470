"""Fits are started, followed and cancelled from the page, and hidden if the server accepts none."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.api_keys import ApiKeyStore
from tests.console.conftest import (
    NARROW,
    WIDE,
    OpenWindow,
    assert_no_horizontal_scroll,
    enter_key,
    start_long_fit,
)
from tests.servers import RunningServer

FIT_TIMEOUT_MS = 300_000
"""Upper bound for a fit, a process of its own, to start or end on a busy machine; it only ends a hang."""


def active_ranges(page: Page) -> Locator:
    """The heading of the active range set."""
    return page.get_by_role("region", name="Range sets").get_by_role("heading").filter(has_text="active")


def fit_item(page: Page, file: str) -> Locator:
    return page.get_by_role("region", name="Fits").get_by_role("listitem").filter(has_text=file)


def assert_layout(page: Page) -> None:
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        assert_no_horizontal_scroll(page)


@pytest.mark.system
def test_fit_is_started_followed_and_activated(fitting_server: RunningServer, window: OpenWindow) -> None:
    page = window(fitting_server).open("#/live")
    expect(page.get_by_text("No fits yet")).to_be_visible()
    page.get_by_role("button", name="Start a fit…").click()
    dialog = page.get_by_role("dialog", name="Start a fit")
    dialog.get_by_label("File").fill("news/nothing.jsonl")
    dialog.get_by_role("button", name="Start the fit").click()
    expect(dialog.get_by_role("alert")).to_contain_text("no such file")
    dialog.get_by_label("File").fill("news/small.jsonl")
    dialog.get_by_label("Activate the range set").check()
    dialog.get_by_role("button", name="Start the fit").click()
    expect(dialog).to_be_hidden()
    item = fit_item(page, "news/small.jsonl")
    expect(item.get_by_role("heading")).to_contain_text(re.compile("queued|running|done"))
    # the page shows the concepts as soon as the fit is done and its range set active
    expect(active_ranges(page)).to_have_count(1, timeout=FIT_TIMEOUT_MS)
    expect(item.get_by_role("heading")).to_contain_text("done", timeout=FIT_TIMEOUT_MS)
    expect(page.get_by_role("button", name="Switch on…")).to_be_enabled()
    assert_layout(page)


@pytest.mark.full
def test_running_fit_shows_its_progress_and_is_cancelled(fitting_server: RunningServer, window: OpenWindow) -> None:
    job = start_long_fit(fitting_server)
    page = window(fitting_server).open("#/live")
    item = fit_item(page, "news/long.jsonl")
    progress = item.locator("label")
    words = re.compile(r"fitting · [\d,]+ of 20,000 texts · [\d.]+ texts/s · (\d+ (h|min|s) ?)+left")
    expect(progress).to_have_text(words, timeout=FIT_TIMEOUT_MS)
    assert_layout(page)

    # progress events keep the focus on the button and do not replace it
    cancel = item.get_by_role("button", name="Cancel the fit of news/long.jsonl")
    cancel.focus()
    button = cancel.element_handle()
    for _ in range(2):
        before = progress.inner_text()
        expect(progress).not_to_have_text(before, timeout=FIT_TIMEOUT_MS)
        expect(cancel).to_be_focused()
    assert cancel.evaluate("(now, before) => now === before", button)
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Cancel the fit").get_by_role("button", name="Cancel the fit").click()
    expect(item.get_by_role("heading")).to_contain_text("cancelled", timeout=FIT_TIMEOUT_MS)
    expect(item.get_by_role("button")).to_have_count(0)
    assert fitting_server.http.get(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    expect(page.locator("main")).to_be_focused()


@pytest.mark.system
def test_only_an_admin_key_starts_and_cancels_a_fit(
    own_redis: EmbeddedRedis, start_server: Callable[..., RunningServer], corpora: Path, window: OpenWindow
) -> None:
    keys = ApiKeyStore(own_redis)
    tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("read", "admin")}
    running = start_server(redis_url=own_redis.url, fit_dirs=[corpora], fit_threads=1, fit_niceness=3, fit_device="cpu")
    page = window(running).open("#/live")
    fits = page.get_by_role("region", name="Fits")
    dialog = page.get_by_role("dialog", name="Start a fit")

    def start_fit() -> None:
        expect(fits).to_contain_text("No fits yet")
        page.get_by_role("button", name="Start a fit…").click()
        dialog.get_by_label("File").fill("news/long.jsonl")
        dialog.get_by_role("button", name="Start the fit").click()

    enter_key(page, tokens["read"])
    expect(fits.get_by_role("button", name="Start a fit…")).to_be_disabled()
    page.get_by_role("button", name="Key").click()
    enter_key(page, tokens["admin"])
    start_fit()
    expect(dialog).to_be_hidden()
    item = fit_item(page, "news/long.jsonl")
    expect(item).to_contain_text("by key:the-admin")
    item.get_by_role("button", name="Cancel the fit of news/long.jsonl").click()
    page.get_by_role("dialog", name="Cancel the fit").get_by_role("button", name="Cancel the fit").click()
    expect(item.get_by_role("heading")).to_contain_text("cancelled", timeout=FIT_TIMEOUT_MS)


@pytest.mark.system
def test_server_without_fits_hides_them(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/live")
    expect(active_ranges(page)).to_have_count(1)
    expect(page.get_by_role("region", name="Fits")).to_have_count(0)
