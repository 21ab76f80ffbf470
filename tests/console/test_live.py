"""Live: erasures and range sets are changed with a confirmation, and every window shows them."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page, expect

from range_store.storage.codec import assemble
from tests.console.conftest import NARROW, OpenWindow, assert_no_horizontal_scroll
from tests.range_store.builders import random_layer, random_provenance, random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system


def erasures_of(running: RunningServer) -> dict[str, dict[str, object]]:
    return {each["concept"]: each for each in running.http.get("/v1/erasures").json()["erasures"]}


def open_dialog(page: Page, title: str | re.Pattern[str]) -> Locator:
    found = page.get_by_role("dialog", name=title)
    expect(found).to_be_visible()
    return found


def test_erasure_is_switched_on_changed_and_off_in_every_window(server: RunningServer, window: OpenWindow) -> None:
    first, second = window(server).open("#/live"), window(server, viewport=NARROW).open("#/live")
    expect(first.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(second.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    expect(second.locator("#connection")).to_have_text("following")

    first.get_by_role("button", name="Switch on…").click()
    dialog = open_dialog(first, "Switch an erasure on")
    assert not erasures_of(server), "nothing happens before it is confirmed"
    dialog.get_by_label("Concept").select_option("Sports")
    dialog.get_by_label("Share of neurons").fill("80")
    dialog.get_by_label("Ends").select_option("3600")
    dialog.get_by_label("Reason").fill("complaint <42>")
    dialog.get_by_label("Enforced").check()
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    for page in (first, second):
        item = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="Sports"))
        expect(item).to_contain_text("complaint <42>")
        expect(item).to_contain_text("80 % of the neurons")
        expect(item).to_contain_text("enforced")
        expect(item).to_contain_text(re.compile(r"since .* by http · ends in (1 h|59 min)"))
        assert_no_horizontal_scroll(page)
    assert erasures_of(server)["Sports"]["reason"] == "complaint <42>"

    second.get_by_role("button", name="Change Sports").click()
    dialog = open_dialog(second, "Change Sports")
    expect(dialog.get_by_label("Share of neurons")).to_have_value("80")
    expect(dialog.get_by_label("Enforced")).to_be_checked()
    dialog.get_by_label("τ, half-width").fill("1")
    dialog.get_by_role("button", name="Change it for everybody").click()
    expect(first.get_by_text("within ±1 σ")).to_be_visible()
    assert erasures_of(server)["Sports"]["expires_at"] is not None

    first.get_by_role("button", name="Switch off Sports").click()
    dialog = open_dialog(first, "Switch Sports off")
    dialog.get_by_role("button", name="Cancel").click()
    assert erasures_of(server)
    first.get_by_role("button", name="Switch off Sports").click()
    dialog = open_dialog(first, "Switch Sports off")
    dialog.get_by_label("Reason").fill("settled")
    dialog.get_by_role("button", name="Switch it off for everybody").click()
    for page in (first, second):
        expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    newest = server.http.get("/v1/audit").json()["entries"][0]
    assert (newest["action"], newest["reason"]) == ("remove", "settled")


def test_change_keeps_untouched_settings(server: RunningServer, window: OpenWindow) -> None:
    """Values that the controls cannot express are kept: some of the fitted blocks, and half a per cent."""
    identity = server.service.model.identity
    three_blocks = random_range_set(5, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    server.service.store.activate(server.service.store.range_sets.publish(*three_blocks))
    server.service.mirror.refresh()
    settings = {"layer": [0, 1], "top_fraction": 0.305, "tau": 7.25, "reason": "as agreed"}
    server.http.put("/v1/erasures/Sports", json=settings).raise_for_status()
    page = window(server).open("#/live")
    expect(page.get_by_text("30.5 % of the neurons (max) of blocks 0, 1")).to_be_visible()
    page.get_by_role("button", name="Change Sports").click()
    dialog = open_dialog(page, "Change Sports")
    expect(dialog.get_by_label("Block").locator("option:checked")).to_have_text("0, 1")
    expect(dialog.get_by_text("30.5 % · 9 of 32")).to_be_visible()
    dialog.get_by_label("Reason").fill("another reason")
    dialog.get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_text("another reason")).to_be_visible()
    erasure = erasures_of(server)["Sports"]
    assert (erasure["layers"], erasure["top_fraction"], erasure["tau"]) == ([0, 1], 0.305, 7.25)
    page.get_by_role("button", name="Change Sports").click()
    dialog.get_by_label("Block").select_option("all")
    dialog.get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_text("of blocks 0, 1, 2")).to_be_visible()


def test_dialog_offers_only_concepts_that_are_not_erased(server: RunningServer, window: OpenWindow) -> None:
    """An erased concept can only be changed, so that an enforced erasure is not replaced by accident."""
    concepts = [each["concept"] for each in server.http.get("/v1/concepts").json()["concepts"]]
    server.http.put("/v1/erasures/Sports", json={"enforced": True}).raise_for_status()
    page = window(server).open("#/try?erase=Sports")  # the concept under Try is preselected unless it is erased
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    dialog = open_dialog(page, "Switch an erasure on")
    offered = dialog.get_by_label("Concept").locator("option").all_inner_texts()
    assert offered == [each for each in concepts if each != "Sports"]
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    expect(dialog).to_be_hidden()
    assert set(erasures_of(server)) == {"Sports", offered[0]}
    assert erasures_of(server)["Sports"]["enforced"]
    erasures = [{"concept": each} for each in concepts]
    server.http.put("/v1/erasures", json={"erasures": erasures}).raise_for_status()
    expect(page.get_by_role("button", name="Switch on…")).to_be_disabled()
    server.http.delete(f"/v1/erasures/{concepts[0]}").raise_for_status()
    expect(page.get_by_role("button", name="Switch on…")).to_be_enabled()


def test_switch_tells_on_how_many_replicas_it_is_in_force(
    fresh_server: RunningServer, start_server: Callable[..., RunningServer], window: OpenWindow
) -> None:
    page = window(fresh_server, viewport=NARROW).open("#/live")
    in_force = page.get_by_text("In force on")
    expect(page.get_by_text("Generation ")).to_be_visible()
    fresh_server.http.put("/v1/erasures/Sports").raise_for_status()
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    expect(in_force).to_have_count(0)
    other = start_server(name=fresh_server.service.name)
    fresh_server.http.put("/v1/erasures/World").raise_for_status()
    expect(in_force).to_have_text("In force on 2 of 2 replicas")
    hostile = "<img/src=x/onerror=window.pwned=1>" + "x" * 200
    fresh_server.service.store.replicas.report(hostile, "00000000-1", None, seconds=600.0)
    fresh_server.http.delete("/v1/erasures/World").raise_for_status()
    expect(in_force).to_have_text(f"In force on 2 of 3 replicas; not yet: {hostile}")
    assert_no_horizontal_scroll(page)
    fresh_server.service.store.replicas.remove(hostile)
    expect(in_force).to_have_text("In force on 2 of 2 replicas")
    other.service.drain()
    until(lambda: len(fresh_server.http.get("/v1/replicas").json()["replicas"]) == 1)
    fresh_server.http.delete("/v1/erasures/Sports").raise_for_status()
    expect(in_force).to_have_count(0)


def refused_change(page: Page, server: RunningServer, concept: str, **body: object) -> Locator:
    """The dialog whose change of World was refused because somebody changed `concept` in the meantime."""
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    page.get_by_role("button", name="Switch on…").click()
    dialog = open_dialog(page, "Switch an erasure on")
    dialog.get_by_label("Concept").select_option("World")
    server.http.put(f"/v1/erasures/{concept}", json=body).raise_for_status()
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    return dialog


def test_stale_change_is_refused_and_can_be_confirmed(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/live")
    dialog = refused_change(page, server, "Business")
    expect(dialog.get_by_text("Changed in the meantime")).to_be_visible()
    assert set(erasures_of(server)) == {"Business"}
    expect(page.locator(".erasures h3", has_text="Business")).to_be_attached()
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    expect(dialog).to_be_hidden()
    assert set(erasures_of(server)) == {"Business", "World"}


def test_stale_change_of_the_same_concept_shows_what_it_replaces(server: RunningServer, window: OpenWindow) -> None:
    dialog = refused_change(window(server).open("#/live"), server, "World", method="neuron", enforced=True)
    expect(dialog).to_contain_text(re.compile(r"World is erased now: .*enforced.*Press the button again to replace it"))
    assert erasures_of(server)["World"]["enforced"]
    dialog.get_by_label("Enforced").check()
    dialog.get_by_role("button", name="Switch it on for everybody").click()
    expect(dialog).to_be_hidden()
    assert (erasures_of(server)["World"]["enforced"], erasures_of(server)["World"]["method"]) == (True, "range")


def test_range_sets_are_compared_activated_and_rolled_back(fresh_server: RunningServer, window: OpenWindow) -> None:
    identity = fresh_server.service.model.identity
    before = fresh_server.service.store.live_state().range_set
    fewer, inspect = random_range_set(7, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    newer = fresh_server.service.store.range_sets.publish(fewer, inspect)
    fresh_server.http.put("/v1/erasures/Business")
    page = window(fresh_server).open("#/live")
    sets = page.get_by_role("region", name="Range sets")
    expect(sets.get_by_role("heading", name=str(before))).to_contain_text("active")
    for box in sets.get_by_label("Compare").all():
        box.check()
    comparison = page.get_by_role("region", name="Comparison")
    expect(comparison).to_contain_text(re.compile(r"\d+ differences of \d+ facts"))
    expect(comparison).to_contain_text("corpus.name")

    page.get_by_role("button", name=f"Activate {newer}").click()
    dialog = open_dialog(page, "Activate")
    expect(dialog.get_by_label("Force")).to_have_count(0)
    dialog.get_by_role("button", name="Activate for everybody").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Conflict")
    assert fresh_server.service.store.live_state().range_set == before
    dialog.get_by_label("Force").check()
    dialog.get_by_role("button", name="Activate for everybody").click()
    expect(dialog).to_be_hidden()
    assert fresh_server.service.store.live_state().range_set == newer
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()

    page.get_by_role("button", name=f"Roll back to {before}").click()
    open_dialog(page, "Roll back").get_by_role("button", name="Roll back for everybody").click()
    expect(page.get_by_role("heading", name=str(before))).to_contain_text("active")
    assert fresh_server.service.store.live_state().range_set == before


def test_comparison_is_about_provenance_not_ranges(server: RunningServer, window: OpenWindow) -> None:
    """A second fit of the same texts with other numbers has no difference to show, and the page says so."""
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
        ids.append(server.service.store.range_sets.publish(made, inspect))
    page = window(server).open("#/live")
    for range_set in ids[:2]:
        page.locator(f"[data-set='{range_set}']").check()
    comparison = page.get_by_role("region", name="Comparison")
    expect(comparison).to_contain_text("The same model, texts and settings")
    expect(comparison).to_contain_text("not the ranges themselves")
    page.locator(f"[data-set='{ids[2]}']").check()
    expect(comparison).to_contain_text("2 differences of")
    expect(comparison.get_by_role("rowheader", name="corpus.counts.Sports")).to_be_visible()


def test_expired_erasure_disappears_by_itself(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/live")
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible()
    server.http.put("/v1/erasures/Sports", json={"expires_in": 10})
    expect(page.get_by_role("heading", name="Sports")).to_be_visible()
    expect(page.get_by_text("Nothing is erased", exact=True)).to_be_visible(timeout=60_000)
