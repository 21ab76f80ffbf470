"""Sliders: answers while they are dragged, the last one in the end, and no more computed than what they change."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import Window
from tests.servers import RunningServer, with_ranges
from workers.fitting.fit import Fitted

pytestmark = pytest.mark.system
Open = Callable[..., Window]
TEXT = "The striker scored twice in extra time and the home side won the cup."

DRAG = """async ({ answers, seconds, last }) => {
  const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === "100");
  const move = (value) => {
    slider.value = String(value);
    slider.dispatchEvent(new Event("input"));
  };
  let shown = 0;
  const counting = new MutationObserver(() => {
    shown += document.querySelector(".result .scores") ? 1 : 0;
  });
  counting.observe(document.querySelector(".result"), { childList: true });
  const began = performance.now();
  for (let at = 0; performance.now() - began < 1000 * seconds[shown < answers ? 1 : 0]; at += 1) {
    move(1 + (at % 60));
    await new Promise((done) => setTimeout(done, 16));
  }
  counting.disconnect();
  move(last);
  return shown;
}"""
"""Drags for the first number of `seconds`, and on a busy machine for up to the second one until there are answers."""


def drag(page: Page, last: int) -> int:
    """How many answers were shown while the slider had not come to rest, 16 ms from each of its moves to the next."""
    shown: int = page.evaluate(DRAG, {"answers": 3, "seconds": [1.5, 20], "last": last})
    return shown


def test_answers_are_shown_while_it_is_dragged_and_the_last_one_stays(server: RunningServer, window: Open) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect(page.locator(".result")).to_contain_text("neurons masked")
    asked: list[float] = []
    page.on(
        "request",
        lambda request: (
            asked.append(request.post_data_json["erase"]["top_fraction"]) if "classify" in request.url else None
        ),
    )
    assert drag(page, last=100) >= 3
    expect(page.locator(".result")).to_contain_text("32 neurons masked")
    page.wait_for_url("**top=1")
    assert asked[-1] == 1
    expect(page.locator(".result")).to_contain_text("32 neurons masked")


def test_one_that_is_not_answered_does_not_hold_up_the_next(server: RunningServer, window: Open) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect(page.locator(".result")).to_contain_text("9 neurons masked")
    page.route("**/v1/classify", lambda route: None)
    slider = page.get_by_label("Share of neurons")
    with page.expect_request("**/v1/classify"):
        slider.fill("50")
    page.unroute("**/v1/classify")
    slider.fill("100")
    expect(page.locator(".result")).to_contain_text("32 neurons masked")


def test_the_blocks_below_the_mask_are_not_computed_again(
    start_server: Callable[..., RunningServer], fitted: Fitted, window: Open
) -> None:
    running = with_ranges(start_server(trunk_cache_mb=64), fitted)

    def kept() -> tuple[float, float]:
        names = ("neuronlens_trunk_cache_hits_total", "neuronlens_trunk_cache_misses_total")
        hits, misses = (running.value(name) or 0.0 for name in names)
        return hits, misses

    page = window(running).open(f"#/try?text={TEXT}&erase=Sports")
    expect(page.locator(".result")).to_contain_text("masked")
    hits, misses = kept()
    assert misses >= 1
    shown = drag(page, last=100)
    with page.expect_response(lambda reply: '"tau":0.5' in (reply.request.post_data or "")):
        page.get_by_label("τ, half-width").fill("0.5")
    expect(page.locator(".result summary")).to_be_visible()
    now_hits, now_misses = kept()
    assert now_hits >= hits + shown
    assert now_misses == misses
