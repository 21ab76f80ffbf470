"""API keys, missing scopes, an unavailable store, and a connection that is lost and found again."""

import pytest
from playwright.sync_api import Page, Route, expect

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.api_keys import ApiKeyStore
from tests.console.conftest import OpenWindow, enter_key
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer

ServerWithKeys = tuple[RunningServer, dict[str, str], ApiKeyStore]


@pytest.mark.system
def test_missing_key_is_asked_for_once_and_kept_for_the_tab(
    server_with_keys: ServerWithKeys, window: OpenWindow
) -> None:
    running, tokens, _ = server_with_keys
    page = window(running).open("#/live")
    expect(page.get_by_role("dialog")).to_contain_text("This server requires an API key")
    expect(page.get_by_role("dialog")).to_contain_text("--scope infer,read")  # what the first part needs
    enter_key(page, "two words")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("Invalid key")
    enter_key(page, "nl_wrong")
    expect(page.get_by_role("dialog")).to_contain_text("rejected this key")
    enter_key(page, tokens["admin"])
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Key").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("alert").filter(has_text="API key required")).to_be_visible()
    page.get_by_role("button", name="Use another key").click()
    page.get_by_role("button", name="Not now").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.system
def test_what_the_key_may_not_do_is_disabled(server_with_keys: ServerWithKeys, window: OpenWindow) -> None:
    running, tokens, _ = server_with_keys
    fingerprint = running.service.model.identity.fingerprint
    running.service.store.range_sets.publish(*random_range_set(7, hidden=32, n_layers=3, fingerprint=fingerprint))
    running.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="World")))
    running.service.mirror.refresh()
    opened = window(running)
    page = opened.open("#/live")
    actions = ("Switch on…", "Change World", "Switch off World", "Activate")
    enter_key(page, tokens["read"])
    expect(page.locator("main")).to_contain_text("need a key with scope admin")
    for action in actions:
        expect(page.get_by_role("button", name=action)).to_be_disabled()
    page.get_by_role("link", name="Try").click()
    expect(page.locator(".result")).to_contain_text("needs a key with scope infer")
    for control in (page.get_by_label("Text"), page.get_by_label("Sports"), page.get_by_label("Share of neurons")):
        expect(control).to_be_disabled()
    assert not [path for status, path in opened.error_responses if status == 403], "nothing was tried in vain"
    page.get_by_role("button", name="Use another key").click()
    enter_key(page, tokens["admin"])
    expect(page.get_by_label("Text")).to_be_enabled()
    page.get_by_role("link", name="Live").click()
    for action in actions:
        expect(page.get_by_role("button", name=action)).to_be_enabled()
    expect(page.locator("main")).not_to_contain_text("needs a key")


@pytest.mark.system
def test_refused_action_names_the_missing_scope(server_with_keys: ServerWithKeys, window: OpenWindow) -> None:
    """Where the server does not say what a key may do, it is tried."""
    running, tokens, _ = server_with_keys
    opened = window(running)
    opened.page.route("**/v1/capabilities", lambda route: route.fulfill(status=404, body="{}"))
    page = opened.open("#/live")
    enter_key(page, tokens["read"])
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    page.get_by_role("button", name="Switch it on for everybody").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("needs a key with scope admin")


@pytest.mark.system
def test_infer_key_erases_at_the_last_block(server_with_keys: ServerWithKeys, window: OpenWindow) -> None:
    """A key with scope infer cannot read which blocks were fitted, so the page asks for the last one."""
    running, tokens, _ = server_with_keys
    page = window(running).open("#/try?text=a+goal&erase=Sports&method=neuron&top=1")
    with page.expect_request("**/v1/classify") as request:
        enter_key(page, tokens["infer"])
    assert request.value.post_data_json["erase"]["layer"] == -1
    expect(page.locator(".result")).to_contain_text("32 neurons masked")
    expect(page.get_by_label("Block").locator("option:checked")).to_have_text("the last one")
    expect(page.locator("#connection")).to_have_text("not following")
    page.get_by_role("link", name="Live").click()
    expect(page.locator("main").get_by_role("alert").first).to_contain_text("needs a key with scope read")


@pytest.mark.system
def test_revoked_key_is_asked_for_again(server_with_keys: ServerWithKeys, window: OpenWindow) -> None:
    running, tokens, keys = server_with_keys
    page = window(running).open("#/try?text=a+goal")
    enter_key(page, tokens["admin"])
    expect(page.locator(".scores")).to_be_visible()
    keys.revoke("the-admin")
    running.service.keyring.refresh()
    page.get_by_label("Sports").check(force=True)
    expect(page.get_by_role("dialog")).to_contain_text("revoked")


@pytest.mark.system
@pytest.mark.parametrize(
    ("scope", "locator", "text"),
    [
        ("read", ".ranked", "Saliency"),
        ("admin", "main", "The text of Try has the value"),
    ],
)
def test_neurons_show_what_the_scope_allows(
    server_with_keys: ServerWithKeys, window: OpenWindow, scope: str, locator: str, text: str
) -> None:
    """The value of the text under Try needs the scopes infer and read."""
    running, tokens, _ = server_with_keys
    page = window(running).open("#/neurons?concept=Sports&text=a+goal")
    enter_key(page, tokens[scope])
    expect(page.locator(locator).first).to_contain_text(text)
    if scope == "read":
        expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
        expect(page.locator("main")).not_to_contain_text("The text of Try has the value")


@pytest.mark.system
def test_unavailable_store_is_reported_and_can_be_retried(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    page = opened.page

    def unavailable(route: Route) -> None:
        route.fulfill(
            status=503,
            headers={"Retry-After": "1", "Content-Type": "application/problem+json"},
            body='{"code": "store_unavailable", "detail": "the store is away", "status": 503, "request_id": "abc"}',
        )

    for path in ("events", "erasures", "range-sets"):  # if the first two answered, the page would read again by itself
        page.route(f"**/v1/{path}", unavailable)
    opened.open("#/live")
    sets = page.get_by_role("region", name="Range sets")
    expect(sets.get_by_role("alert").filter(has_text="the store is away")).to_contain_text("abc")
    page.unroute("**/v1/range-sets")
    sets.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", name=str(server.service.store.live_state().range_set))).to_be_visible()


def expect_reconnected(page: Page) -> None:
    expect(page.locator("#lost")).to_be_hidden()


@pytest.mark.system
def test_try_recovers_from_a_lost_connection(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    page = opened.open("#/try?text=a+goal&erase=Sports")
    expect(page.locator(".scores")).to_be_visible()
    opened.disconnect()
    page.get_by_label("Share of neurons").fill("90")
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator(".result")).to_contain_text("No connection")
    server.http.put("/v1/erasures/World")
    opened.reconnect()
    expect_reconnected(page)
    expect(page.locator(".scores")).to_be_visible()
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_role("heading", name="World")).to_be_visible()


@pytest.mark.system
def test_live_recovers_from_a_lost_connection(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    page = opened.open("#/live")
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Concept").select_option("Sports")
    opened.disconnect()
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    expect(dialog.get_by_role("alert")).to_contain_text("No connection")
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("no connection")
    opened.reconnect()
    expect_reconnected(page)
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    server.http.put("/v1/erasures/World").raise_for_status()
    expect(page.get_by_role("heading", name="World")).to_be_visible()


@pytest.mark.system
def test_neurons_recover_from_a_lost_connection(server: RunningServer, window: OpenWindow) -> None:
    opened = window(server)
    page = opened.open("#/neurons?concept=Sports")
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    opened.disconnect()
    page.get_by_label("Block").select_option("1")
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("main .problem").first).to_contain_text("No connection")
    opened.reconnect()
    expect_reconnected(page)
    expect(page.get_by_role("heading", name="of block 1")).to_be_visible()
    expect(page.locator(".ranked caption")).to_contain_text("Neurons of Sports")
    expect(page.locator("main .problem")).to_have_count(0)


@pytest.mark.full
def test_report_opens_after_a_lost_connection(server_with_report: RunningServer, window: OpenWindow) -> None:
    opened = window(server_with_report)
    page = opened.open("#/evaluation")
    expect(page.get_by_role("button", name="Open tiny")).to_be_visible()
    opened.disconnect()
    page.get_by_role("button", name="Open tiny").click()
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("main .problem")).to_contain_text("No connection")
    opened.reconnect()
    expect_reconnected(page)
    expect(page.frame_locator("iframe").locator("h1")).to_be_visible()


@pytest.mark.system
def test_server_without_ranges_says_what_to_do(fitting_server: RunningServer, window: OpenWindow) -> None:
    opened = window(fitting_server)
    page = opened.open("#/neurons")
    expect(page.get_by_text("No range set is active")).to_be_visible()
    page.get_by_role("link", name="Try").click()
    page.get_by_role("group", name="Examples").get_by_role("button").first.click()
    expect(page.locator(".scores")).to_be_visible()
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_text("No range set is published")).to_be_visible()
    assert {status for status, _ in opened.error_responses} <= {404, 503}
