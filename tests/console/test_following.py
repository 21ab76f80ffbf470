"""Other windows follow a change: by a stream, or by polling, and without disturbing what the user does.

The page's clock stands still and moves only when a test advances it, so delays are measured on that clock.
"""

import itertools
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.console.conftest import OpenWindow
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system


def stop_clock(page: Page) -> None:
    """Let no timer of the page fire until the test advances its clock."""
    page.clock.install(time=time.time())
    page.clock.pause_at(time.time() + 1)


def advance_until(page: Page, condition: Callable[[], bool]) -> None:
    """Advance the page's clock in steps of a second until the condition holds."""

    def holds() -> bool:
        page.clock.run_for(1000)
        return condition()

    until(holds)


def refuse_streams(page: Page, status: int, **headers: str) -> None:
    def refuse(route: Route) -> None:
        route.fulfill(status=status, headers=headers, body='{"code": "too_many_streams", "detail": "full"}')

    page.route("**/v1/events", refuse)


def publish(running: RunningServer, seed: int) -> str:
    fingerprint = running.service.model.identity.fingerprint
    made = random_range_set(seed, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=fingerprint)
    return str(running.service.store.range_sets.publish(*made))


def following(page: Page, state: str) -> Locator:
    connection = page.locator("#connection")
    expect(connection).to_have_text(state)
    return connection


def test_stream_shows_a_change_without_any_delay_of_the_page(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    stop_clock(opened.page)
    page = opened.open("#/live")
    following(page, "following")
    server.http.put("/v1/erasures/Sports").raise_for_status()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()


def test_server_without_streams_is_polled_every_second(fresh_server: RunningServer, window: OpenWindow) -> None:
    opened = window(fresh_server)
    refuse_streams(opened.page, 404)
    stop_clock(opened.page)
    page = opened.open("#/live")
    following(page, "following (polling)")
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    fresh_server.http.put("/v1/erasures/Sports").raise_for_status()
    page.clock.run_for(999)
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    published = page.get_by_role("heading", name=publish(fresh_server, 11))
    advance_until(page, published.is_visible)


def test_refused_stream_is_replaced_by_polling_and_tried_again(server: RunningServer, window: OpenWindow) -> None:
    """Polling starts at once, whatever Retry-After says."""
    opened = window(server)
    refuse_streams(opened.page, 429, **{"Retry-After": "600"})
    stop_clock(opened.page)
    page = opened.open("#/live")
    connection = following(page, "following (polling)")
    server.http.put("/v1/erasures/Sports").raise_for_status()
    page.clock.run_for(999)
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    page.unroute("**/v1/events")
    advance_until(page, lambda: connection.inner_text() == "following")


def test_ended_stream_is_opened_again(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    streams = itertools.count()

    def end_the_first(route: Route) -> None:
        if next(streams) == 0:
            route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=": hello\n\n")
        else:
            route.continue_()

    opened.page.route("**/v1/events", end_the_first)
    page = opened.open("#/live")
    following(page, "following")
    server.http.put("/v1/erasures/Sports").raise_for_status()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()


@pytest.mark.parametrize("state", ["following", "following (polling)"])
def test_change_elsewhere_keeps_focus_and_opened_details(
    fresh_server: RunningServer, window: OpenWindow, state: str
) -> None:
    """The focused button keeps the focus, and opened Provenance details stay open."""
    fresh_server.http.put("/v1/erasures/Sports").raise_for_status()
    opened = window(fresh_server)
    if "polling" in state:
        refuse_streams(opened.page, 404)
    stop_clock(opened.page)
    page = opened.open("#/live")
    following(page, state)
    sets = page.get_by_role("region", name="Range sets")
    provenance = sets.get_by_text("Provenance", exact=True)
    provenance.click()
    expect(sets.get_by_role("rowheader", name="model.fingerprint")).to_be_visible()
    page.get_by_role("button", name="Change Sports").focus()
    fresh_server.http.put("/v1/erasures/World", json={"reason": "from elsewhere"}).raise_for_status()
    advance_until(page, page.get_by_text("from elsewhere").is_visible)
    expect(page.get_by_role("button", name="Change Sports")).to_be_focused()
    provenance.focus()
    advance_until(page, page.get_by_role("heading", name=publish(fresh_server, 12)).is_visible)
    expect(sets.get_by_role("rowheader", name="model.fingerprint").filter(visible=True)).to_have_count(1)
    focused = page.evaluate("document.activeElement.dataset.key")
    assert focused == f"see {fresh_server.service.store.live_state().range_set}"
