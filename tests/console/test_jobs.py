"""Fits: started, followed and cancelled from the page; hidden where the server takes none."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.console.conftest import NARROW, Window
from tests.e2e.conftest import Running
from tests.e2e.fits.conftest import LONG, fitting, started, texts  # noqa: F401  fixtures
from tests.range_store.waiting import until

pytestmark = pytest.mark.system
Open = Callable[..., Window]
LONGER = 120_000
"""Milliseconds that a fit, a process of its own, may take to start and to end on a busy machine."""


def test_a_fit_is_started_followed_and_used(
    fitting: Running,  # noqa: F811
    window: Open,
    no_sideways: Callable[..., None],
) -> None:
    page = window(fitting, viewport=NARROW).open("#/live")
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
    expect(page.get_by_role("region", name="Range sets")).to_contain_text("active", timeout=LONGER)
    expect(item.get_by_role("heading")).to_contain_text("done", timeout=LONGER)
    expect(page.get_by_role("button", name="Switch on…")).to_be_enabled()
    no_sideways(page)


def test_one_under_way_shows_how_far_it_is_and_is_cancelled(fitting: Running, window: Open) -> None:  # noqa: F811
    job = started(fitting.http, LONG)["id"]
    page = window(fitting).open("#/live")
    item = page.get_by_role("region", name="Fits").get_by_role("listitem").filter(has_text="news/long.jsonl")
    expect(item.get_by_label(re.compile(r"fitting · [\d,]+ of 20,000 texts"))).to_be_visible(timeout=LONGER)
    item.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog", name="Cancel the fit").get_by_role("button", name="Cancel the fit").click()
    expect(item.get_by_role("heading")).to_contain_text("cancelled", timeout=LONGER)
    expect(item.get_by_role("button")).to_have_count(0)
    until(lambda: fitting.http.get(f"/v1/jobs/{job}").json()["state"] == "cancelled", 60)


def test_a_server_that_takes_no_fits_shows_none(news: Running, window: Open) -> None:
    page = window(news).open("#/live")
    expect(page.get_by_role("region", name="Range sets")).to_contain_text("active")
    expect(page.get_by_role("region", name="Fits")).to_have_count(0)
