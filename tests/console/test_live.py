"""Live: what is erased, changed with care, seen by every window."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page, expect

from range_store.codec import assemble
from tests.console.conftest import NARROW, Window
from tests.range_store.builders import random_layer, random_provenance, random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]


def live(running: RunningServer) -> dict[str, dict[str, object]]:
    return {each["concept"]: each for each in running.http.get("/v1/erasures").json()["erasures"]}


def dialog(page: Page, title: str | re.Pattern[str]) -> Locator:
    found = page.get_by_role("dialog", name=title)
    expect(found).to_be_visible()
    return found


def test_on_change_and_off_with_a_reason_while_another_window_follows(
    server: RunningServer, window: Open, no_sideways: Callable[[Page], None]
) -> None:
    mine, other = window(server).open("#/live"), window(server, viewport=NARROW).open("#/live")
    expect(mine.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(other.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(other.locator("#connection")).to_have_text("following")

    mine.get_by_role("button", name="Switch on…").click()
    box = dialog(mine, "Switch an erasure on")
    assert not live(server), "nothing happens before it is confirmed"
    box.get_by_label("Concept").select_option("Sports")
    box.get_by_label("Share of neurons").fill("80")
    box.get_by_label("Ends").select_option("3600")
    box.get_by_label("Reason").fill("complaint <42>")
    box.get_by_label("Enforced").check()
    box.get_by_role("button", name="Switch it on for everybody").click()
    for page in (mine, other):
        item = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="Sports"))
        expect(item).to_contain_text("complaint <42>")
        expect(item).to_contain_text("80 % of the neurons")
        expect(item).to_contain_text("enforced")
        expect(item).to_contain_text(re.compile(r"since .* by http · ends in (1 h|59 min)"))
        no_sideways(page)
    assert live(server)["Sports"]["reason"] == "complaint <42>"

    other.get_by_role("button", name="Change Sports").click()
    box = dialog(other, "Change Sports")
    expect(box.get_by_label("Share of neurons")).to_have_value("80")
    expect(box.get_by_label("Enforced")).to_be_checked()
    box.get_by_label("τ, half-width").fill("1")
    box.get_by_role("button", name="Change it for everybody").click()
    expect(mine.get_by_text("within ±1 σ")).to_be_visible()
    assert live(server)["Sports"]["expires_at"] is not None

    mine.get_by_role("button", name="Switch off Sports").click()
    box = dialog(mine, "Switch Sports off")
    box.get_by_role("button", name="Cancel").click()
    assert live(server)
    mine.get_by_role("button", name="Switch off Sports").click()
    box = dialog(mine, "Switch Sports off")
    box.get_by_label("Reason").fill("settled")
    box.get_by_role("button", name="Switch it off for everybody").click()
    for page in (mine, other):
        expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    newest = server.http.get("/v1/audit").json()["entries"][0]
    assert (newest["action"], newest["reason"]) == ("remove", "settled")


def test_changing_an_erasure_leaves_alone_what_was_not_touched(server: RunningServer, window: Open) -> None:
    """Settings that the controls do not offer, some of the fitted blocks and half a per cent, are kept."""
    identity = server.service.model.identity
    three = random_range_set(5, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    server.service.store.activate(server.service.store.publish(*three))
    server.service.mirror.refresh()
    asked = {"layer": [0, 1], "top_fraction": 0.305, "tau": 7.25, "reason": "as agreed"}
    server.http.put("/v1/erasures/Sports", json=asked).raise_for_status()
    page = window(server).open("#/live")
    expect(page.get_by_text("30.5 % of the neurons (max) of blocks 0, 1")).to_be_visible()
    page.get_by_role("button", name="Change Sports").click()
    box = dialog(page, "Change Sports")
    expect(box.get_by_label("Block").locator("option:checked")).to_have_text("0, 1")
    expect(box.get_by_text("30.5 % · 9 of 32")).to_be_visible()
    box.get_by_label("Reason").fill("another reason")
    box.get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_text("another reason")).to_be_visible()
    now = live(server)["Sports"]
    assert (now["layers"], now["top_fraction"], now["tau"]) == ([0, 1], 0.305, 7.25)
    page.get_by_role("button", name="Change Sports").click()
    box.get_by_label("Block").select_option("all")
    box.get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_text("of blocks 0, 1, 2")).to_be_visible()


def test_only_what_is_not_erased_can_be_switched_on(server: RunningServer, window: Open) -> None:
    """What is erased is changed instead: so nothing stops being enforced unseen."""
    concepts = [each["concept"] for each in server.http.get("/v1/concepts").json()["concepts"]]
    server.http.put("/v1/erasures/Sports", json={"enforced": True}).raise_for_status()
    page = window(server).open("#/try?erase=Sports")  # what is chosen under Try is offered first, but for this
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    box = dialog(page, "Switch an erasure on")
    offered = box.get_by_label("Concept").locator("option").all_inner_texts()
    assert offered == [each for each in concepts if each != "Sports"]
    box.get_by_role("button", name="Switch it on for everybody").click()
    expect(box).to_be_hidden()
    now = live(server)
    assert set(now) == {"Sports", offered[0]}
    assert now["Sports"]["enforced"]
    erasures = [{"concept": each} for each in concepts]
    server.http.put("/v1/erasures", json={"erasures": erasures}).raise_for_status()
    expect(page.get_by_role("button", name="Switch on…")).to_be_disabled()
    server.http.delete(f"/v1/erasures/{concepts[0]}").raise_for_status()
    expect(page.get_by_role("button", name="Switch on…")).to_be_enabled()


def test_where_several_replicas_report_a_switch_says_on_how_many_it_is_in_force(
    server: RunningServer, start_server: Callable[..., RunningServer], window: Open, no_sideways: Callable[[Page], None]
) -> None:
    page = window(server, viewport=NARROW).open("#/live")
    told = page.get_by_text("In force on")
    expect(page.get_by_text("Generation ")).to_be_visible()
    server.http.put("/v1/erasures/Sports").raise_for_status()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    expect(told).to_have_count(0)
    other = start_server(name=server.service.name)
    server.http.put("/v1/erasures/World").raise_for_status()
    expect(told).to_have_text("In force on 2 of 2 replicas")
    hostile = "<img/src=x/onerror=window.pwned=1>" + "x" * 200
    server.service.store.replicas.report(hostile, "00000000-1", None, seconds=600.0)
    server.http.delete("/v1/erasures/World").raise_for_status()
    expect(told).to_have_text(f"In force on 2 of 3 replicas; not yet: {hostile}")
    no_sideways(page)
    server.service.store.replicas.remove(hostile)
    expect(told).to_have_text("In force on 2 of 2 replicas")
    other.service.drain()
    until(lambda: len(server.http.get("/v1/replicas").json()["replicas"]) == 1)
    server.http.delete("/v1/erasures/Sports").raise_for_status()
    expect(told).to_have_count(0)


def test_where_no_events_come_the_page_asks(server: RunningServer, window: Open) -> None:
    mine = window(server)
    mine.page.route("**/v1/events", lambda route: route.fulfill(status=404, body="{}"))
    page = mine.open("#/live")
    expect(page.locator("#connection")).to_have_text("following (asking)")
    server.http.put("/v1/erasures/Sports")
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()


def test_while_the_server_has_no_stream_to_spare_the_page_asks(server: RunningServer, window: Open) -> None:
    mine = window(server)
    refusal = {"status": 429, "headers": {"Retry-After": "1"}, "body": '{"code": "queue_full", "detail": "full"}'}
    mine.page.route("**/v1/events", lambda route: route.fulfill(**refusal))
    page = mine.open("#/live")
    expect(page.locator("#connection")).to_have_text("following (asking)")
    mine.page.unroute("**/v1/events")
    server.http.put("/v1/erasures/Sports")
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("following", timeout=40_000)


def outrun(page: Page, server: RunningServer, concept: str, **body: object) -> Locator:
    """The dialog that switches World on, refused, since somebody changed `concept` meanwhile."""
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    box = dialog(page, "Switch an erasure on")
    box.get_by_label("Concept").select_option("World")
    server.http.put(f"/v1/erasures/{concept}", json=body).raise_for_status()
    box.get_by_role("button", name="Switch it on for everybody").click()
    return box


def test_who_was_slower_is_told_and_may_go_on(server: RunningServer, window: Open) -> None:
    page = window(server).open("#/live")
    box = outrun(page, server, "Business")
    expect(box.get_by_text("Somebody was faster")).to_be_visible()
    assert set(live(server)) == {"Business"}
    expect(page.locator(".erasures h3", has_text="Business")).to_be_attached()
    box.get_by_role("button", name="Switch it on for everybody").click()
    expect(box).to_be_hidden()
    assert set(live(server)) == {"Business", "World"}


def test_who_was_slower_is_told_what_going_on_would_replace(server: RunningServer, window: Open) -> None:
    box = outrun(window(server).open("#/live"), server, "World", method="neuron", enforced=True)
    expect(box).to_contain_text(re.compile(r"World is erased now: .*enforced.*The same button replaces that"))
    assert live(server)["World"]["enforced"]
    box.get_by_label("Enforced").check()
    box.get_by_role("button", name="Switch it on for everybody").click()
    expect(box).to_be_hidden()
    assert (live(server)["World"]["enforced"], live(server)["World"]["method"]) == (True, "range")


def test_range_sets_are_compared_activated_and_rolled_back(server: RunningServer, window: Open) -> None:
    identity = server.service.model.identity
    before = server.service.store.live().range_set
    fewer, inspect = random_range_set(7, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    newer = server.service.store.publish(fewer, inspect)
    server.http.put("/v1/erasures/Business")
    page = window(server).open("#/live")
    sets = page.get_by_role("region", name="Range sets")
    expect(sets.get_by_role("heading", name=str(before))).to_contain_text("active")
    for box in sets.get_by_label("Compare").all():
        box.check()
    comparison = page.get_by_role("region", name="Comparison")
    expect(comparison).to_contain_text(re.compile(r"\d+ differences of \d+ facts"))
    expect(comparison).to_contain_text("corpus.name")

    page.get_by_role("button", name=f"Activate {newer}").click()
    box = dialog(page, "Activate")
    expect(box.get_by_label("Force")).to_have_count(0)
    box.get_by_role("button", name="Activate for everybody").click()
    expect(box.get_by_role("alert")).to_contain_text("That does not fit what is there")
    assert server.service.store.live().range_set == before
    box.get_by_label("Force").check()
    box.get_by_role("button", name="Activate for everybody").click()
    expect(box).to_be_hidden()
    assert server.service.store.live().range_set == newer
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()

    page.get_by_role("button", name=f"Roll back to {before}").click()
    dialog(page, "Roll back").get_by_role("button", name="Roll back for everybody").click()
    expect(page.get_by_role("heading", name=str(before))).to_contain_text("active")
    assert server.service.store.live().range_set == before


def test_a_comparison_is_of_where_two_come_from(server: RunningServer, window: Open) -> None:
    """Another fit of the same texts, with other numbers, differs in nothing that is compared, and the page says so."""
    fingerprint = server.service.model.identity.fingerprint
    first = random_provenance(7, ("Sports", "World"), hidden=32, fingerprint=fingerprint)
    later = first.model_copy(update={"created_at": first.created_at + 86400})
    counts = {"Sports": 3, "World": first.corpus.rows - 3}
    fewer = later.model_copy(update={"corpus": later.corpus.model_copy(update={"counts": counts})})
    ids = []
    for seed, provenance in enumerate((first, later, fewer)):
        parts = {layer: random_layer(10 * seed + layer, provenance) for layer in provenance.settings.layers}
        inspect = {layer: part[1] for layer, part in parts.items()}
        made = assemble(provenance, {layer: part[0] for layer, part in parts.items()}, inspect)
        ids.append(server.service.store.publish(made, inspect))
    page = window(server).open("#/live")
    for one in ids[:2]:
        page.locator(f"[data-set='{one}']").check()
    comparison = page.get_by_role("region", name="Comparison")
    expect(comparison).to_contain_text("The same model, texts and settings")
    expect(comparison).to_contain_text("not the ranges themselves")
    page.locator(f"[data-set='{ids[2]}']").check()
    expect(comparison).to_contain_text("2 differences of")
    expect(comparison.get_by_role("rowheader", name="corpus.counts.Sports")).to_be_visible()


def test_an_erasure_that_ends_is_gone_by_itself(server: RunningServer, window: Open) -> None:
    page = window(server).open("#/live")
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    server.http.put("/v1/erasures/Sports", json={"expires_in": 10})
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible(timeout=60_000)


def test_it_can_all_be_done_from_the_keyboard(server: RunningServer, window: Open) -> None:
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
    box = dialog(page, "Switch an erasure on")
    expect(box.get_by_label("Concept")).to_be_focused()
    page.keyboard.press("Escape")
    expect(box).to_be_hidden()
    expect(page.get_by_role("button", name="Switch on…")).to_be_focused()
    page.keyboard.press("Enter")
    expect(box.get_by_label("Concept")).to_be_focused()
    for _ in range(20):
        page.keyboard.press("Tab")
        if box.get_by_label("Reason").evaluate("(field) => field === document.activeElement"):
            break
    page.keyboard.type("by hand")
    page.keyboard.press("Enter")
    expect(page.get_by_text("by hand")).to_be_visible()
    expect(box).to_be_hidden()
    page.get_by_role("button", name="Change World").focus()
    page.keyboard.press("Enter")
    expect(box).to_be_hidden()
    expect(page.get_by_role("dialog", name="Change World")).to_be_visible()
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Change it for everybody").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Change World")).to_be_focused()
