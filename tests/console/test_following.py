"""Other windows follow: how soon, by a stream and by asking, and without taking away what somebody is at."""

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Window
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]

CHANGES = 9
WATCH = """() => {
  window.seen = {};
  new MutationObserver(() => {
    for (const [words] of document.querySelector("#main").textContent.matchAll(/change \\d+/g)) {
      window.seen[words] ??= performance.timeOrigin + performance.now();
    }
  }).observe(document.querySelector("#main"), { childList: true, subtree: true, characterData: true });
}"""


def refused(page: Page, status: int, **headers: str) -> None:
    """Have every stream refused from now on."""
    reply = {"status": status, "headers": headers, "body": '{"code": "too_many_streams", "detail": "full"}'}
    page.route("**/v1/events", lambda route: route.fulfill(**reply))  # type: ignore[arg-type]


def published(running: RunningServer, seed: int) -> str:
    """A range set that somebody else publishes."""
    identity = running.service.model.identity
    fitted = random_range_set(seed, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    return str(running.service.store.publish(*fitted))


@pytest.mark.parametrize("how", ["following", "following (asking)"])
def test_another_window_follows_within_a_second(server: RunningServer, window: Open, how: str) -> None:
    """The median of several, in one of four rounds: the others may meet a machine that is busy with something else."""
    mine = window(server)
    if "asking" in how:
        refused(mine.page, 404)
    page = mine.open("#/live")
    expect(page.locator("#connection")).to_have_text(how)
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.evaluate(WATCH)

    def median(first: int) -> float:
        took = []
        for change in range(first, first + CHANGES):
            page.wait_for_timeout(900 * (0.618 * change % 1))  # it asks in a rhythm, and people do not
            words = f"change {change}"
            began = time.time()
            server.http.put("/v1/erasures/Sports", json={"reason": words}).raise_for_status()
            page.wait_for_function("(words) => window.seen[words]", arg=words)
            took.append(page.evaluate("(words) => window.seen[words]", words) / 1000 - began)
        return statistics.median(took)

    assert any(median(first) < 1 for first in range(0, 4 * CHANGES, CHANGES))


def test_while_a_stream_is_refused_for_long_the_page_asks_at_once(server: RunningServer, window: Open) -> None:
    mine = window(server)
    refused(mine.page, 429, **{"Retry-After": "600"})
    page = mine.open("#/live")
    expect(page.locator("#connection")).to_have_text("following (asking)")
    server.http.put("/v1/erasures/Sports").raise_for_status()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    newer = published(server, 11)
    expect(page.get_by_role("heading", name=newer)).to_be_visible()


def test_a_stream_that_is_refused_for_five_seconds_is_not_waited_for(server: RunningServer, window: Open) -> None:
    mine = window(server)
    refused(mine.page, 429, **{"Retry-After": "5"})
    asked: list[tuple[str, float]] = []
    mine.page.on(
        "request",
        lambda request: asked.append((request.url.rsplit("/", 1)[1], time.monotonic())),
    )
    page = mine.open("#/try")  # nothing but following asks for what is live there
    expect(page.locator("#connection")).to_have_text("following (asking)")
    times = dict(reversed(asked))
    assert times["erasures"] - times["events"] < 4.5  # waited for, it would be 5 or more


def test_a_stream_that_ends_is_opened_again(server: RunningServer, window: Open) -> None:
    mine = window(server)
    ended = itertools.count()

    def end(route: object) -> None:
        if next(ended) == 0:
            route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=": hello\n\n")  # type: ignore[attr-defined]
        else:
            route.continue_()  # type: ignore[attr-defined]

    mine.page.route("**/v1/events", end)
    page = mine.open("#/live")
    expect(page.locator("#connection")).to_have_text("following")
    server.http.put("/v1/erasures/Sports").raise_for_status()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()


@pytest.mark.parametrize("how", ["following", "following (asking)"])
def test_what_happens_elsewhere_takes_nothing_away(server: RunningServer, window: Open, how: str) -> None:
    """The focus stays on the button that it is on, and a Provenance that was opened stays open."""
    server.http.put("/v1/erasures/Sports").raise_for_status()
    mine = window(server)
    if "asking" in how:
        refused(mine.page, 404)
    page = mine.open("#/live")
    expect(page.locator("#connection")).to_have_text(how)
    sets = page.get_by_role("region", name="Range sets")
    provenance = sets.get_by_text("Provenance", exact=True)
    provenance.click()
    facts = sets.get_by_role("cell", name="random", exact=True)
    expect(sets.get_by_role("rowheader", name="model.fingerprint")).to_be_visible()
    expect(facts).to_have_count(0)
    page.get_by_role("button", name="Change Sports").focus()
    server.http.put("/v1/erasures/World", json={"reason": "from elsewhere"}).raise_for_status()
    expect(page.get_by_text("from elsewhere")).to_be_visible()
    expect(page.get_by_role("button", name="Change Sports")).to_be_focused()
    provenance.focus()
    newer = published(server, 12)
    expect(page.get_by_role("heading", name=newer)).to_be_visible()
    expect(sets.get_by_role("rowheader", name="model.fingerprint").filter(visible=True)).to_have_count(1)
    focused = "document.activeElement.dataset.key"
    assert page.evaluate(focused) == f"see {server.service.store.live().range_set}"
