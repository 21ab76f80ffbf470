"""Neurons: the table, the densities and the heat map show what the API returns."""

from collections.abc import Callable
from html import escape
from itertools import permutations

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import NARROW, WIDE, OpenWindow, assert_no_horizontal_scroll, tab_to, unanswered
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer

pytestmark = pytest.mark.system


def traces(page: Page, region: str) -> list[dict[str, object]]:
    """The data of a region's chart, once plotly has drawn it."""
    plot = page.get_by_role("region", name=region).locator(".js-plotly-plot")
    expect(plot.locator(".main-svg").first).to_be_visible()
    found: list[dict[str, object]] = plot.evaluate(
        "(plot) => plot.data.map(({ name, x, y, z, yaxis, mode }) => ({ name, x, y, z, yaxis: yaxis ?? null, mode }))"
    )
    return found


def assert_layout(page: Page) -> None:
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        assert_no_horizontal_scroll(page)


def test_ranking_densities_and_overlap_are_those_of_the_api(server: RunningServer, window: OpenWindow) -> None:
    page = window(server, viewport=NARROW).open("#/neurons?concept=Sports&ranking=selectivity")
    first = server.http.get("/v1/concepts/Sports/ranges", params={"ranking": "selectivity", "limit": 12}).json()
    picks = page.locator(".ranked [data-neuron]")
    expect(picks.first).to_have_text(str(first["neurons"][0]["neuron"]))
    assert picks.all_inner_texts() == [str(each["neuron"]) for each in first["neurons"]]
    expect(page.get_by_role("heading", name=f"Neuron {first['neurons'][0]['neuron']} of block 2")).to_be_visible()
    page.get_by_role("button", name="Next").click()
    second = server.http.get(
        "/v1/concepts/Sports/ranges",
        params={"ranking": "selectivity", "limit": 12, "cursor": first["next_cursor"]},
    ).json()
    chosen = second["neurons"][3]["neuron"]
    page.get_by_role("button", name=f"Show neuron {chosen}", exact=True).click()
    expect(page.get_by_role("heading", name=f"Neuron {chosen} of block 2")).to_be_visible()
    neuron = server.http.get(f"/v1/neurons/2/{chosen}").json()
    drawn = traces(page, "One neuron")
    for each in neuron["concepts"]:
        density = [t for t in drawn if t["name"] == escape(each["concept"], quote=False) and t["yaxis"] is None]
        inside = sum(each["histogram"]["counts"]) / each["texts"]
        assert sum(density[0]["y"]) == pytest.approx(inside), each["concept"]
        ranges = [t["x"] for t in drawn if t["yaxis"] == "y2" and t["mode"] == "lines"]
        assert [each["low"], each["high"]] in ranges or each["low"] is None
    overlap = server.http.get("/v1/overlap", params={"ranking": "selectivity"}).json()
    assert traces(page, "Overlap")[0]["z"] == overlap["share"]
    assert_layout(page)


def test_link_opens_the_same_neuron_and_the_slider_moves_its_ranges(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/neurons?concept=World&layer=1&neuron=5&tau=1")
    expect(page.get_by_role("heading", name="Neuron 5 of block 1")).to_be_visible()
    with page.expect_response(lambda reply: "/v1/neurons/1/5?tau=0" in reply.url):
        page.get_by_label("τ", exact=True).fill("0")
    expect(page.get_by_text("Range, ±0 σ")).to_be_visible()
    page.get_by_label("Block").select_option("2")
    expect(page.get_by_role("heading", name="of block 2")).to_be_visible()
    page.wait_for_function("() => location.hash.includes('layer=2')")


def test_late_response_about_another_concept_is_dropped(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/neurons?concept=World&ranking=selectivity")
    expect(page.get_by_role("region", name="One neuron").get_by_role("heading")).to_be_visible()
    query = {"ranking": "selectivity", "limit": 1}
    tops = {
        name: server.http.get(f"/v1/concepts/{name}/ranges", params=query).json()["neurons"][0]["neuron"]
        for name in ("World", "Sports", "Business")
    }
    dropped, chosen = next((one, other) for one, other in permutations(tops, 2) if tops[one] != tops[other])
    concept = page.get_by_label("Concept", exact=True)
    concept.select_option(label="Météo & co")
    with unanswered(page, f"**/v1/concepts/{dropped}/ranges*"):
        with page.expect_request(f"**/v1/concepts/{dropped}/ranges*"):
            concept.select_option(dropped)
        concept.select_option(chosen)
    expect(page.locator(".ranked caption")).to_contain_text(f"Neurons of {chosen}")
    expect(page.get_by_role("heading", name=f"Neuron {tops[chosen]} of block 2")).to_be_visible()
    assert f"neuron={tops[chosen]}" in str(page.get_by_role("link", name="Neurons").get_attribute("href"))


def test_drawn_concepts_are_chosen_if_there_are_many(
    start_server: Callable[..., RunningServer], window: OpenWindow
) -> None:
    """The keyboard operates the choice. The chosen concept is always drawn, and each drawn concept has its ranges."""
    running = start_server()
    names = [f"Concept {at}" for at in range(16)]
    fingerprint = running.service.model.identity.fingerprint
    fitted = random_range_set(3, names, hidden=32, n_layers=3, fingerprint=fingerprint)
    running.service.store.activate(running.service.store.range_sets.publish(*fitted))
    running.service.mirror.refresh()
    page = window(running, viewport=NARROW).open("#/neurons?concept=Concept+15&layer=2&neuron=3")

    def drawn() -> set[object]:
        return {trace["name"] for trace in traces(page, "One neuron") if trace["yaxis"] is None}

    def rows_of_ranges() -> float:
        plot = page.get_by_role("region", name="One neuron").locator(".js-plotly-plot")
        return float(plot.evaluate("(plot) => plot.layout.yaxis2.range[0]")) + 0.4

    region = page.get_by_role("region", name="One neuron")
    choice = region.get_by_text("Drawn: 14 of 16 concepts")
    expect(choice).to_be_visible()
    assert drawn() == {"Concept 15", *names[:13]}
    assert rows_of_ranges() == 14
    tab_to(page, region.locator("summary").first)
    page.keyboard.press("Enter")
    tab_to(page, region.get_by_label("Concept 14", exact=True))
    page.keyboard.press("Space")
    expect(region.get_by_text("Drawn: 15 of 16 concepts")).to_be_visible()
    page.wait_for_function("() => document.querySelector('.js-plotly-plot').layout.yaxis2.range[0] > 14")
    assert drawn() == {"Concept 15", *names[:13], "Concept 14"}
    expect(region.get_by_label("Concept 15", exact=True)).to_be_disabled()
    page.keyboard.press("Space")
    page.get_by_label("τ", exact=True).fill("1")  # redrawing keeps the choice and its open list
    expect(region).to_contain_text("(mean ± 1 σ)")
    expect(region.get_by_text("Drawn: 14 of 16 concepts")).to_be_visible()
    expect(region.get_by_label("Concept 14", exact=True)).to_be_attached()
    assert drawn() == {"Concept 15", *names[:13]}
    assert_layout(page)


def test_value_of_the_text_under_try_is_marked(server: RunningServer, window: OpenWindow) -> None:
    text = "The keeper saved a penalty."
    page = window(server).open(f"#/try?text={text}")
    expect(page.locator(".scores")).to_be_visible()
    page.get_by_role("link", name="Neurons").click()
    region = page.get_by_role("region", name="One neuron")
    expect(region).to_contain_text("The text of Try has the value")
    traces(page, "One neuron")
    neuron = int(page.locator("[data-neuron][aria-pressed=true]").inner_text())
    body = {"inputs": text, "layer": 2, "neurons": [neuron]}
    (activations,) = server.http.post("/v1/activations", json=body).json()["results"]
    plot = region.locator(".js-plotly-plot")
    assert plot.evaluate("(plot) => plot.layout.shapes.map(({ x0 }) => x0)") == activations["values"]
    server.http.put("/v1/erasures/World", json={"enforced": True})  # an admin may still see the value
    page.reload()
    expect(region).to_contain_text("The text of Try has the value")


def test_charts_follow_the_color_scheme(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/neurons")
    traces(page, "One neuron")
    plot = page.get_by_role("region", name="One neuron").locator(".js-plotly-plot")
    light = plot.evaluate("(plot) => plot.layout.font.color")
    page.get_by_role("button", name="Switch to dark", exact=True).click()
    page.wait_for_function("([plot, before]) => plot.layout.font.color !== before", arg=[plot.element_handle(), light])
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Switch to light", exact=True).click()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    expect(page.get_by_role("button", name="Switch to dark", exact=True)).to_be_focused()
