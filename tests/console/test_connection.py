"""Keys asked for, refusals explained, a lost server shown and found again."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from range_store.api_keys import KeyStore
from tests.console.conftest import Window
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]
Keyed = tuple[RunningServer, dict[str, str], KeyStore]


def give(window: Window, token: str) -> None:
    window.page.get_by_label("Key", exact=True).fill(token)
    window.page.get_by_role("button", name="Use it").click()


def test_a_key_is_asked_for_once_and_kept_for_the_tab(server_with_keys: Keyed, window: Open) -> None:
    running, tokens, _ = server_with_keys
    mine = window(running)
    page = mine.open("#/live")
    expect(page.get_by_role("dialog")).to_contain_text("This server asks for an API key")
    give(mine, "two words")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("A key is one word")
    give(mine, "nl_wrong")
    expect(page.get_by_role("dialog")).to_contain_text("does not know this key")
    give(mine, tokens["admin"])
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Key").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("alert").filter(has_text="A key is needed")).to_be_visible()
    page.get_by_role("button", name="Use another key").click()
    page.get_by_role("button", name="Not now").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_key_that_may_not_is_told_which_scope_is_missing(server_with_keys: Keyed, window: Open) -> None:
    running, tokens, _ = server_with_keys
    mine = window(running)
    page = mine.open("#/live")
    give(mine, tokens["read"])
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    page.get_by_role("button", name="Switch it on for everybody").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("needs a key with scope admin")


def test_a_key_that_may_only_classify_erases_where_the_others_do(server_with_keys: Keyed, window: Open) -> None:
    """It is told of no blocks, and means the last one."""
    running, tokens, _ = server_with_keys
    mine = window(running)
    page = mine.open("#/try?text=a+goal&erase=Sports&method=neuron&top=1")
    with page.expect_request("**/v1/classify") as asked:
        give(mine, tokens["infer"])
    assert asked.value.post_data_json["erase"]["layer"] == -1
    expect(page.locator(".result")).to_contain_text("32 neurons masked")
    expect(page.get_by_label("Block").locator("option:checked")).to_have_text("the last one")
    expect(page.locator("#connection")).to_have_text("not following")
    page.get_by_role("link", name="Live").click()
    expect(page.locator("main").get_by_role("alert").first).to_contain_text("needs a key with scope read")


def test_a_revoked_key_is_asked_for_anew(server_with_keys: Keyed, window: Open) -> None:
    running, tokens, keys = server_with_keys
    mine = window(running)
    page = mine.open("#/try?text=a+goal")
    give(mine, tokens["admin"])
    expect(page.locator(".scores")).to_be_visible()
    keys.revoke("the-admin")
    running.service.keyring.refresh()
    page.get_by_label("Sports").check(force=True)
    expect(page.get_by_role("dialog")).to_contain_text("revoked")


def test_the_store_away_is_a_notice_and_no_blank_page(server: RunningServer, window: Open) -> None:
    mine = window(server)
    page = mine.page

    def away(route: Route) -> None:
        route.fulfill(
            status=503,
            headers={"Retry-After": "1", "Content-Type": "application/problem+json"},
            body='{"code": "store_unavailable", "detail": "the store is away", "status": 503, "request_id": "abc"}',
        )

    for path in ("events", "erasures", "range-sets"):  # where the first two answer, the page reads again by itself
        page.route(f"**/v1/{path}", away)
    mine.open("#/live")
    sets = page.get_by_role("region", name="Range sets")
    expect(sets.get_by_role("alert").filter(has_text="the store is away")).to_contain_text("abc")
    page.unroute("**/v1/range-sets")
    sets.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", name=str(server.service.store.live().range_set))).to_be_visible()


def test_a_server_that_is_lost_is_shown_and_found_again(server: RunningServer, window: Open) -> None:
    mine = window(server)
    page = mine.open("#/try?text=a+goal&erase=Sports")
    expect(page.locator(".scores")).to_be_visible()
    mine.away = True
    page.context.set_offline(True)
    page.get_by_label("Share of neurons").fill("90")
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator(".result")).to_contain_text("No connection")
    server.http.put("/v1/erasures/World")
    page.context.set_offline(False)
    expect(page.locator("#lost")).to_be_hidden()
    expect(page.locator(".scores")).to_be_visible()
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_role("heading", name="World")).to_be_visible()


def test_live_goes_on_after_a_server_was_lost(server: RunningServer, window: Open) -> None:
    mine = window(server)
    page = mine.open("#/live")
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    box = page.get_by_role("dialog")
    box.get_by_label("Concept").select_option("Sports")
    mine.away = True
    page.context.set_offline(True)
    box.get_by_role("button", name="Switch it on for everybody").click()
    expect(box.get_by_role("alert")).to_contain_text("No connection")
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("no connection")
    page.context.set_offline(False)
    expect(page.locator("#lost")).to_be_hidden()
    box.get_by_role("button", name="Switch it on for everybody").click()
    expect(box).to_be_hidden()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    server.http.put("/v1/erasures/World").raise_for_status()
    expect(page.get_by_role("heading", name="World")).to_be_visible()


def test_neurons_come_back_after_a_server_was_lost(server: RunningServer, window: Open) -> None:
    mine = window(server)
    page = mine.open("#/neurons?concept=Sports")
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    mine.away = True
    page.context.set_offline(True)
    page.get_by_label("Block").select_option("1")
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("main .problem").first).to_contain_text("No connection")
    page.context.set_offline(False)
    expect(page.locator("#lost")).to_be_hidden()
    expect(page.get_by_role("heading", name="of block 1")).to_be_visible()
    expect(page.locator(".ranked caption")).to_contain_text("Neurons of Sports")
    expect(page.locator("main .problem")).to_have_count(0)


def test_a_report_comes_after_a_server_was_lost(
    start_server: Callable[..., RunningServer], report: Path, window: Open
) -> None:
    mine = window(start_server(reports_dir=report))
    page = mine.open("#/evaluation")
    expect(page.get_by_role("button", name="Open tiny")).to_be_visible()
    mine.away = True
    page.context.set_offline(True)
    page.get_by_role("button", name="Open tiny").click()
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("main .problem")).to_contain_text("No connection")
    page.context.set_offline(False)
    expect(page.locator("#lost")).to_be_hidden()
    expect(page.frame_locator("iframe").locator("h1")).to_be_visible()


def test_neurons_with_a_key(server_with_keys: Keyed, window: Open) -> None:
    """`read` sees them, `infer` is told what it lacks, and only who may do both sees where the text falls."""
    running, tokens, _ = server_with_keys
    for scope, where, what in (
        ("read", ".ranked", "Saliency"),
        ("infer", "main .problem", "needs a key with scope read"),
        ("admin", "main", "The text under Try has the value"),
    ):
        mine = window(running)
        page = mine.open("#/neurons?concept=Sports&text=a+goal")
        give(mine, tokens[scope])
        expect(page.locator(where).first).to_contain_text(what)
        if scope == "read":
            expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
            expect(page.locator("main")).not_to_contain_text("The text under Try has the value")


def test_without_ranges_the_page_says_what_to_do(start_server: Callable[..., RunningServer], window: Open) -> None:
    running = start_server()
    mine = window(running)
    page = mine.open("#/neurons")
    expect(page.get_by_text("No range set is active")).to_be_visible()
    page.get_by_role("link", name="Try").click()
    page.get_by_role("group", name="Examples").get_by_role("button").first.click()
    expect(page.locator(".scores")).to_be_visible()
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_text("No range set is published")).to_be_visible()
    until(lambda: all(status in (404, 503) for status, _ in mine.refused))
