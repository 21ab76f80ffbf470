"""Try: what the page says is what the API says, at once, and can be taken elsewhere."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

from range_store.api_keys import KeyStore
from range_store.erasure import Erasure
from range_store.live import LiveErasure
from tests.console.conftest import NARROW, Window
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]
TEXT = "The striker scored twice in extra time and the home side won the cup."


def scores(page: Page) -> dict[str, tuple[str, ...]]:
    """The result's table: numbers by label."""
    rows = page.locator(".scores tbody tr:not(.bars)")
    found = {}
    for row in rows.all():
        found[row.locator("th bdi").inner_text()] = tuple(row.locator("td").all_inner_texts())
    return found


def expected(running: RunningServer, text: str, **fields: object) -> dict[str, tuple[str, str]]:
    """What the API says, in the page's words."""
    (result,) = running.classify(text, compare=True, **fields).json()["results"]
    before = {each["label"]: each["score"] for each in result["baseline"]["scores"]}
    return {
        each["label"]: (f"{100 * before[each['label']]:.1f} %", f"{100 * each['score']:.1f} %")
        for each in result["scores"]
    }


def settled(page: Page, words: str) -> None:
    """Wait until the result is the one of a number of masked neurons."""
    expect(page.locator(".result")).to_contain_text(words)


@pytest.mark.parametrize("width", [NARROW, None])
def test_an_example_a_concept_and_what_it_moves(
    server: RunningServer, window: Open, no_sideways: Callable[[Page], None], width: dict[str, int] | None
) -> None:
    page = window(server, **({"viewport": width} if width else {})).open()
    expect(page.get_by_text("Nothing to classify yet")).to_be_visible()
    page.get_by_role("group", name="Examples").get_by_role("button", name="Sport", exact=True).click()
    expect(page.locator(".result")).to_contain_text("Nothing is erased: choose a concept")
    assert page.locator(".scores thead th").all_inner_texts() == ["Label", "Score"]
    page.get_by_label("Sports").check(force=True)
    settled(page, "masked at the read position")
    text = page.get_by_label("Text").input_value()
    wanted = expected(server, text, erase=["Sports"])
    found = scores(page)
    assert {label: cells[:2] for label, cells in found.items()} == wanted
    for label, (before, after, change) in found.items():
        moved = float(after[:-2]) - float(before[:-2])
        shown = float(change.removesuffix(" pp").replace("−", "-"))
        assert shown == pytest.approx(moved, abs=0.11), label
    (result,) = server.classify(text, erase=["Sports"]).json()["results"]
    settled(page, f"{result['masked_neurons']} neuron")
    no_sideways(page)


def test_every_control_is_in_the_request(server: RunningServer, window: Open) -> None:
    page = window(server).open()
    page.get_by_label("Text").fill(TEXT)
    page.get_by_label("Sci/Tech").check(force=True)
    page.get_by_label("Météo & co").check(force=True)
    page.get_by_label("τ, half-width").fill("1.5")
    page.get_by_label("Share of neurons").fill("50")
    page.get_by_label("Block").select_option("1")
    page.get_by_label("Ranking").select_option("selectivity")
    page.get_by_label("Masked neurons become").select_option("damp")
    damped = '"damp":0.25'  # it asks while the controls are set, too
    with page.expect_request(lambda request: damped in (request.post_data or "")) as asked:
        page.get_by_label("Part that is left").fill("25")
    erase = asked.value.post_data_json["erase"]
    assert erase == {
        "concepts": ["Sci/Tech", "Météo & co"],
        "method": "range",
        "tau": 1.5,
        "top_fraction": 0.5,
        "ranking": "selectivity",
        "layer": 1,
        "replacement": {"damp": 0.25},
    }
    with page.expect_request("**/v1/classify") as asked:
        page.get_by_text("Neuron", exact=True).click()
    assert asked.value.post_data_json["erase"]["method"] == "neuron"
    expect(page.get_by_label("τ, half-width")).to_be_hidden()
    with page.expect_request("**/v1/classify") as asked:
        page.get_by_label("Block").select_option("all")
    assert asked.value.post_data_json["erase"]["layer"] == [1, 2]


def test_only_the_last_answer_counts(server: RunningServer, window: Open) -> None:
    """The first answer is held back until the second is there: it must not replace it."""
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    settled(page, "masked")
    held = threading.Event()
    holding: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.post_data_json["erase"]["top_fraction"] == 0.5:
            holding.append(route)
            held.set()
        else:
            route.continue_()

    page.route("**/v1/classify", hold)
    slider = page.get_by_label("Share of neurons")
    with page.expect_request("**/v1/classify"):
        slider.fill("50")
    slider.fill("100")
    settled(page, "32 neurons masked")
    for route in holding:
        route.continue_()
    page.evaluate("new Promise((done) => setTimeout(done, 200))")  # time to do it wrong
    settled(page, "32 neurons masked")
    assert held.is_set()


def test_a_slider_may_be_moved_as_long_as_one_likes(server: RunningServer, window: Open) -> None:
    """A browser refuses an address that changes too often, and says so in its log."""
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    settled(page, "masked")
    page.evaluate(
        """async () => {
          const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === "100");
          for (let move = 0; move < 400; move += 1) {
            slider.value = String(1 + (move % 100));
            slider.dispatchEvent(new Event("input"));
            if (move % 50 === 0) await new Promise(requestAnimationFrame);
          }
        }"""
    )
    settled(page, "32 neurons masked")
    page.wait_for_url("**top=1")


def test_a_new_answer_leaves_open_what_was_and_the_focus_where_it_was(server: RunningServer, window: Open) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    settled(page, "9 neurons masked")
    page.locator(".result summary").click()
    page.get_by_role("button", name="Copy link").focus()
    page.evaluate(
        """() => {
          const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === "100");
          slider.value = "100";
          slider.dispatchEvent(new Event("input"));
        }"""
    )
    settled(page, "32 neurons masked")
    expect(page.locator(".result li")).to_be_visible()
    expect(page.get_by_role("button", name="Copy link")).to_be_focused()


def test_a_link_shares_the_state_and_holds_no_key(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], window: Open
) -> None:
    running, tokens, _ = server_with_keys
    first = window(running).open(f"#/try?text={TEXT}")
    first.get_by_label("Key", exact=True).fill(tokens["read"])
    first.get_by_role("button", name="Use it").click()
    expect(first.locator(".result")).to_contain_text("This key may not do that")
    first.get_by_role("button", name="Use another key").click()
    first.get_by_label("Key", exact=True).fill(tokens["admin"])
    first.get_by_role("button", name="Use it").click()
    first.get_by_label("World").check(force=True)
    first.get_by_label("τ, half-width").fill("0.7")
    settled(first, "within ±0.7 σ")
    assert "nl_" not in first.url
    assert tokens["admin"] not in first.content()
    kept = first.evaluate("[JSON.stringify(localStorage), document.cookie]")
    assert tokens["admin"] not in str(kept)
    first.wait_for_url("**tau=0.7*")
    address, found = first.url, scores(first)
    other = window(running)
    other.page.goto(address)
    other.page.get_by_label("Key", exact=True).fill(tokens["admin"])
    other.page.get_by_role("button", name="Use it").click()
    settled(other.page, "within ±0.7 σ")
    assert scores(other.page) == found
    expect(other.page.get_by_label("World")).to_be_checked()
    expect(other.page.get_by_label("Text")).to_have_value(TEXT)


TOLD = """() => new MutationObserver(() => { window.told ||= document.body.innerText.includes("Copied"); })
  .observe(document.body, { childList: true, subtree: true, characterData: true })"""
"""Notes that the page said so, for it says so for a moment only."""
HOSTILE = 'it\'s "quoted" $HOME `id` \\ %s ! \n <b>é</b> \u202eabc 🎈'


@pytest.mark.parametrize("key", [False, True])
def test_the_copied_command_and_program_give_the_same_answer(
    server: RunningServer, server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], window: Open, key: bool
) -> None:
    running, tokens, _ = server_with_keys
    chosen = running if key else server
    page = window(chosen, permissions=["clipboard-read", "clipboard-write"]).open()
    if key:
        page.get_by_label("Key", exact=True).fill(tokens["admin"])
        page.get_by_role("button", name="Use it").click()
    page.get_by_label("Text").fill(HOSTILE)
    page.get_by_label("Sports").check(force=True)
    settled(page, "masked at the read position")
    found = scores(page)
    environment = {**os.environ, "NEURONLENS_API_KEY": tokens["admin"]}
    page.evaluate(TOLD)
    page.get_by_role("button", name="Copy as curl").click()
    until(lambda: page.evaluate("window.told"))  # the page's policy lets no waiting script be evaluated
    command = page.evaluate("navigator.clipboard.readText()")
    assert "nl_" not in command
    assert "\u202e" not in command
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment)
    (result,) = json.loads(done.stdout)["results"]
    assert {each["label"]: f"{100 * each['score']:.1f} %" for each in result["scores"]} == {
        label: cells[1] for label, cells in found.items()
    }
    page.get_by_role("button", name="Copy as Python").click()
    page.wait_for_function("() => navigator.clipboard.readText().then((text) => text.includes('httpx'))")
    program = page.evaluate("navigator.clipboard.readText()")
    assert "nl_" not in program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"'label': '{result['label']}'" in done.stdout


def test_what_the_controls_say_is_what_is_asked(server: RunningServer, window: Open) -> None:
    """Also where the usual ranking was not fitted, or a link names a block that was not."""
    identity = server.service.model.identity
    fitted = random_range_set(
        5, ("Sports",), hidden=32, n_layers=3, layers=[1], rankings=["selectivity"], fingerprint=identity.fingerprint
    )
    server.service.store.activate(server.service.store.publish(*fitted))
    server.service.mirror.refresh()
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports")
    settled(page, "masked at the read position")
    expect(page.get_by_label("Ranking")).to_have_value("selectivity")
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&layer=2&ranking=max")
    settled(page, "layer 2 not fitted")
    expect(page.get_by_label("Block")).to_have_value("2")
    page.get_by_label("Block").select_option("1")
    settled(page, "masked at the read position")


def test_where_there_is_no_clipboard_the_text_can_still_be_taken(server: RunningServer, window: Open) -> None:
    page = window(server).open(f"#/try?text={TEXT}")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy as curl").click()
    assert page.get_by_role("dialog").get_by_label("curl command").input_value().startswith("curl -s http://127.0.0.1")


def test_what_is_live_is_tried_too_and_followed(server: RunningServer, window: Open) -> None:
    page = window(server).open(f"#/try?text={TEXT}")
    page.get_by_text("What is live").click()
    expect(page.get_by_text("Live now: nothing")).to_be_visible()
    server.http.put("/v1/erasures/Business", json={"method": "neuron", "top_fraction": 1.0})
    expect(page.get_by_text("Live now: Business")).to_be_visible()
    settled(page, "32 neurons masked")
    expect(page.get_by_text(re.compile("Applied: 1 erasure, live"))).to_be_visible()


def test_an_enforced_erasure_hides_the_baseline_from_who_may_not_see_it(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], window: Open
) -> None:
    running, tokens, _ = server_with_keys
    running.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="World"), enforced=True))
    running.service.mirror.refresh()
    page = window(running).open(f"#/try?text={TEXT}")
    page.get_by_label("Key", exact=True).fill(tokens["infer"])
    page.get_by_role("button", name="Use it").click()
    settled(page, "the scores without it are shown to scope admin only")
    assert all(len(cells) == 1 for cells in scores(page).values())
    expect(page.locator("main")).to_contain_text("needs a key with scope read")
