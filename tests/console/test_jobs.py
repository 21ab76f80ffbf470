"""Fits: started, followed and cancelled from the page; hidden where the server takes none."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from range_store.api_keys import KeyStore
from range_store.embedded import EmbeddedRedis
from tests.console.conftest import NARROW, WIDE, Window
from tests.e2e.fits.conftest import LONG, fitting, started, texts  # noqa: F401  fixtures
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]
LONGER = 300_000
"""Milliseconds that a fit, a process of its own, may take to start and to end on a busy machine."""


def active_ranges(page: Page) -> Locator:
    """The heading of the active range set."""
    return page.get_by_role("region", name="Range sets").get_by_role("heading").filter(has_text="active")


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_a_fit_is_started_followed_and_used(
    fitting: RunningServer,  # noqa: F811
    window: Open,
    no_sideways: Callable[..., None],
    size: dict[str, int],
) -> None:
    page = window(fitting, viewport=size).open("#/live")
    expect(page.get_by_text("No fits yet")).to_be_visible()
    page.get_by_role("button", name="Start a fit…").click()
    box = page.get_by_role("dialog", name="Start a fit")
    box.get_by_label("File").fill("news/nothing.jsonl")
    box.get_by_role("button", name="Start it").click()
    expect(box.get_by_role("alert")).to_contain_text("no such file")
    box.get_by_label("File").fill("news/small.jsonl")
    box.get_by_label("Activate it").check()
    box.get_by_role("button", name="Start it").click()
    expect(box).to_be_hidden()
    item = page.get_by_role("region", name="Fits").get_by_role("listitem").filter(has_text="news/small.jsonl")
    expect(item.get_by_role("heading")).to_contain_text(re.compile("queued|running|done"))
    # it is active when it is done, and the page then shows its concepts
    expect(active_ranges(page)).to_have_count(1, timeout=LONGER)
    expect(item.get_by_role("heading")).to_contain_text("done", timeout=LONGER)
    expect(page.get_by_role("button", name="Switch on…")).to_be_enabled()
    no_sideways(page)


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_one_under_way_shows_how_far_it_is_and_is_cancelled(
    fitting: RunningServer,  # noqa: F811
    window: Open,
    no_sideways: Callable[..., None],
    size: dict[str, int],
) -> None:
    job = started(fitting.http, LONG | {"batch_tokens": 64})["id"]
    page = window(fitting, viewport=size).open("#/live")
    item = page.get_by_role("region", name="Fits").get_by_role("listitem").filter(has_text="news/long.jsonl")
    far = item.locator("label")
    told = re.compile(r"fitting · [\d,]+ of 20,000 texts · [\d.]+ texts/s · (\d+ (h|min|s) ?)+left")
    expect(far).to_have_text(told, timeout=LONGER)
    no_sideways(page)

    # what is told of it meanwhile leaves the focus where it is, and an outdated list has no second button
    stop = item.get_by_role("button", name="Cancel the fit of news/long.jsonl")
    stop.focus()
    button = stop.element_handle()
    for _ in range(2):
        before = far.inner_text()
        expect(far).not_to_have_text(before, timeout=LONGER)
        expect(stop).to_be_focused()
    assert stop.evaluate("(now, before) => now === before", button)
    page.keyboard.press("Enter")
    page.get_by_role("dialog", name="Cancel the fit").get_by_role("button", name="Cancel the fit").click()
    expect(item.get_by_role("heading")).to_contain_text("cancelled", timeout=LONGER)
    expect(item.get_by_role("button")).to_have_count(0)
    until(lambda: fitting.http.get(f"/v1/jobs/{job}").json()["state"] == "cancelled", 120)
    expect(page.locator("main")).to_be_focused()


def test_with_keys_only_an_admin_starts_one(
    own_redis: EmbeddedRedis,
    start_server: Callable[..., RunningServer],
    texts: Path,  # noqa: F811
    window: Open,
) -> None:
    keys = KeyStore(own_redis)
    tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("read", "admin")}
    running = start_server(redis_url=own_redis.url, fit_dirs=[texts], fit_threads=1, fit_niceness=3, fit_device="cpu")
    page = window(running).open("#/live")

    def give(token: str) -> None:
        page.get_by_label("Key", exact=True).fill(token)
        page.get_by_role("button", name="Use it").click()

    give(tokens["read"])
    fits = page.get_by_role("region", name="Fits")
    expect(fits).to_contain_text("No fits yet")
    box = page.get_by_role("dialog", name="Start a fit")
    for allowed in (False, True):
        page.get_by_role("button", name="Start a fit…").click()
        box.get_by_label("File").fill("news/small.jsonl")
        box.get_by_role("button", name="Start it").click()
        if not allowed:
            expect(box.get_by_role("alert")).to_contain_text("needs a key with scope admin")
            box.get_by_role("button", name="Cancel").click()
            page.get_by_role("button", name="Key").click()
            give(tokens["admin"])
            expect(fits).to_contain_text("No fits yet")
    expect(box).to_be_hidden()
    item = fits.get_by_role("listitem").filter(has_text="news/small.jsonl")
    expect(item).to_contain_text("by key:the-admin")
    expect(item.get_by_role("heading")).to_contain_text("done", timeout=LONGER)


def test_a_server_that_takes_no_fits_shows_none(server: RunningServer, window: Open) -> None:
    page = window(server).open("#/live")
    expect(active_ranges(page)).to_have_count(1)
    expect(page.get_by_role("region", name="Fits")).to_have_count(0)
