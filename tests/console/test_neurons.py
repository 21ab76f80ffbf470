"""Neurons: the table, the densities and the heat map are those of the API."""

from collections.abc import Callable
from html import escape

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import NARROW, Window
from tests.e2e.conftest import Running

pytestmark = pytest.mark.system
Open = Callable[..., Window]


def traces(page: Page, region: str) -> list[dict[str, object]]:
    """What plotly was given for a region's chart, once it is drawn."""
    plot = page.get_by_role("region", name=region).locator(".js-plotly-plot")
    expect(plot.locator(".main-svg").first).to_be_visible()
    found: list[dict[str, object]] = plot.evaluate(
        "(plot) => plot.data.map(({ name, x, y, z, yaxis, mode }) => ({ name, x, y, z, yaxis: yaxis ?? null, mode }))"
    )
    return found


@pytest.mark.parametrize("width", [NARROW, None])
def test_neurons_by_rank_and_what_one_looks_like(
    news: Running, window: Open, no_sideways: Callable[[Page], None], width: dict[str, int] | None
) -> None:
    page = window(news, **({"viewport": width} if width else {})).open("#/neurons?concept=Sports&ranking=selectivity")
    first = news.http.get("/v1/concepts/Sports/ranges", params={"ranking": "selectivity", "limit": 12}).json()
    picks = page.locator(".ranked [data-neuron]")
    expect(picks.first).to_have_text(str(first["neurons"][0]["neuron"]))
    assert picks.all_inner_texts() == [str(each["neuron"]) for each in first["neurons"]]
    expect(page.get_by_role("heading", name=f"Neuron {first['neurons'][0]['neuron']} of block 2")).to_be_visible()
    page.get_by_role("button", name="Next").click()
    second = news.http.get(
        "/v1/concepts/Sports/ranges",
        params={"ranking": "selectivity", "limit": 12, "cursor": first["next_cursor"]},
    ).json()
    chosen = second["neurons"][3]["neuron"]
    page.get_by_role("button", name=f"Show neuron {chosen}", exact=True).click()
    expect(page.get_by_role("heading", name=f"Neuron {chosen} of block 2")).to_be_visible()
    neuron = news.http.get(f"/v1/neurons/2/{chosen}").json()
    drawn = traces(page, "One neuron")
    for each in neuron["concepts"]:
        density = [t for t in drawn if t["name"] == escape(each["concept"], quote=False) and t["yaxis"] is None]
        inside = sum(each["histogram"]["counts"]) / each["texts"]
        assert sum(density[0]["y"]) == pytest.approx(inside), each["concept"]
        ranges = [t["x"] for t in drawn if t["yaxis"] == "y2" and t["mode"] == "lines"]
        assert [each["low"], each["high"]] in ranges or each["low"] is None
    overlap = news.http.get("/v1/overlap", params={"ranking": "selectivity"}).json()
    assert traces(page, "Overlap")[0]["z"] == overlap["share"]
    no_sideways(page)


def test_a_link_leads_to_the_same_neuron_and_a_slider_moves_the_ranges(news: Running, window: Open) -> None:
    page = window(news).open("#/neurons?concept=World&layer=1&neuron=5&tau=1")
    expect(page.get_by_role("heading", name="Neuron 5 of block 1")).to_be_visible()
    with page.expect_response(lambda reply: "/v1/neurons/1/5?tau=0" in reply.url):
        page.get_by_label("τ", exact=True).fill("0")
    expect(page.get_by_text("Range, ±0 σ")).to_be_visible()
    page.get_by_label("Block").select_option("2")
    expect(page.get_by_role("heading", name="of block 2")).to_be_visible()
    page.wait_for_function("() => location.hash.includes('layer=2')")


def test_where_the_text_under_try_falls(news: Running, window: Open) -> None:
    text = "The keeper saved a penalty."
    page = window(news).open(f"#/try?text={text}")
    expect(page.locator(".scores")).to_be_visible()
    page.get_by_role("link", name="Neurons").click()
    region = page.get_by_role("region", name="One neuron")
    expect(region).to_contain_text("The text under Try has the value")
    traces(page, "One neuron")
    neuron = int(page.locator("[data-neuron][aria-pressed=true]").inner_text())
    body = {"inputs": text, "layer": 2, "neurons": [neuron]}
    (told,) = news.http.post("/v1/activations", json=body).json()["results"]
    plot = region.locator(".js-plotly-plot")
    assert plot.evaluate("(plot) => plot.layout.shapes.map(({ x0 }) => x0)") == told["values"]
    news.http.put("/v1/erasures/World", json={"enforced": True})  # whoever may change may still see
    page.reload()
    expect(region).to_contain_text("The text under Try has the value")


def test_charts_change_with_light_and_dark(news: Running, window: Open) -> None:
    page = window(news).open("#/neurons")
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
