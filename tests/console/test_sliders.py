"""Sliders: answers appear while one is dragged, the last one stays, and only what changed is computed."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import OpenWindow
from tests.servers import RunningServer, with_ranges
from workers.fitting.fit import FitResult

pytestmark = pytest.mark.system
TEXT = "The striker scored twice in extra time and the home side won the cup."

DRAG = """async ({ answers, last }) => {
  const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === "100");
  const move = (value) => {
    slider.value = String(value);
    slider.dispatchEvent(new Event("input"));
  };
  let shown = 0;
  const counter = new MutationObserver(() => {
    shown += document.querySelector(".result .scores") ? 1 : 0;
  });
  counter.observe(document.querySelector(".result"), { childList: true });
  for (let at = 0; shown < answers; at += 1) {
    move(1 + (at % 60));
    await new Promise((done) => setTimeout(done, 16));
  }
  counter.disconnect();
  move(last);
  return shown;
}"""


def drag(page: Page, last: int) -> int:
    """Move the slider every 16 ms until three answers were shown, then to `last`; returns the number of answers."""
    shown: int = page.evaluate(DRAG, {"answers": 3, "last": last})
    return shown


def test_answers_appear_while_dragging_and_the_last_one_stays(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect(page.locator(".result")).to_contain_text("neurons masked")
    requested: list[float] = []

    def record(request: object) -> None:
        if "classify" in request.url:  # type: ignore[attr-defined]
            requested.append(request.post_data_json["erase"]["top_fraction"])  # type: ignore[attr-defined]

    page.on("request", record)
    drag(page, last=100)
    expect(page.locator(".result")).to_contain_text("32 neurons masked")
    page.wait_for_url("**top=1")
    assert requested[-1] == 1
    expect(page.locator(".result")).to_contain_text("32 neurons masked")


MOVE = """async (most) => {
  const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === most);
  for (let at = 0; at < 40; at += 1) {
    slider.value = String(1 + (at % 5));
    slider.dispatchEvent(new Event("input"));
    await new Promise((done) => setTimeout(done, 16));
  }
}"""
"""Moves the slider of that maximum for as long as ten requests may take."""


def test_slider_that_changes_no_request_sends_none(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}")
    expect(page.locator(".scores")).to_be_visible()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url.rpartition("/")[2]))
    page.evaluate(MOVE, "100")
    with page.expect_response("**/v1/classify"):
        page.get_by_label("Sports").check(force=True)
    assert requested.count("classify") == 1
    page.get_by_role("link", name="Neurons").click()
    expect(page.locator("main")).to_contain_text("The text of Try has the value")
    assert requested.count("activations") == 1
    page.evaluate(MOVE, "6")
    with page.expect_response("**/v1/neurons/**tau=2"):
        page.get_by_label("τ").fill("2")
    assert requested.count("activations") == 1, "the value does not depend on the range"


def test_result_follows_enforced_erasures(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}")
    expect(page.locator(".result")).to_contain_text("Nothing is erased")
    server.http.put("/v1/erasures/World", json={"enforced": True}).raise_for_status()
    expect(page.locator(".result")).to_contain_text("masked at the read position")
    server.http.delete("/v1/erasures/World").raise_for_status()
    expect(page.locator(".result")).to_contain_text("Nothing is erased")


def test_unanswered_request_does_not_hold_up_the_next(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect(page.locator(".result")).to_contain_text("9 neurons masked")
    page.route("**/v1/classify", lambda route: None)
    slider = page.get_by_label("Share of neurons")
    with page.expect_request("**/v1/classify"):
        slider.fill("50")
    page.unroute("**/v1/classify")
    slider.fill("100")
    expect(page.locator(".result")).to_contain_text("32 neurons masked")


def test_blocks_below_the_mask_are_computed_once(
    start_server: Callable[..., RunningServer], fitted: FitResult, window: OpenWindow
) -> None:
    running = with_ranges(start_server(trunk_cache_mb=64), fitted)

    def trunk_cache() -> tuple[float, float]:
        names = ("neuronlens_trunk_cache_hits_total", "neuronlens_trunk_cache_misses_total")
        hits, misses = (running.value(name) or 0.0 for name in names)
        return hits, misses

    page = window(running).open(f"#/try?text={TEXT}&erase=Sports")
    expect(page.locator(".result")).to_contain_text("masked")
    hits, misses = trunk_cache()
    assert misses >= 1
    shown = drag(page, last=100)
    with page.expect_response(lambda response: '"tau":0.5' in (response.request.post_data or "")):
        page.get_by_label("τ, half-width").fill("0.5")
    expect(page.locator(".result summary")).to_be_visible()
    hits_after, misses_after = trunk_cache()
    assert hits_after >= hits + shown
    assert misses_after == misses
