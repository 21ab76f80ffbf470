"""Try: the page shows what the API returns, and its state can be copied as a link, a command or a program."""

import json
import os
import re
import subprocess
import sys

import pytest
from playwright.sync_api import Page, Request, Route, expect

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from range_store.storage.api_keys import ApiKeyStore
from tests.console.conftest import NARROW, WIDE, OpenWindow, assert_no_horizontal_scroll, enter_key
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.servers import RunningServer

pytestmark = pytest.mark.system
TEXT = "The striker scored twice in extra time and the home side won the cup."


def scores(page: Page) -> dict[str, tuple[str, ...]]:
    """The cells of the result's table by label."""
    rows = page.locator(".scores tbody tr:not(.bars)")
    found = {}
    for row in rows.all():
        found[row.locator("th bdi").inner_text()] = tuple(row.locator("td").all_inner_texts())
    return found


def expected_scores(running: RunningServer, text: str, **fields: object) -> dict[str, tuple[str, str]]:
    """The scores before and after the erasure, as the page formats them."""
    (result,) = running.classify(text, compare=True, **fields).json()["results"]
    before = {each["label"]: each["score"] for each in result["baseline"]["scores"]}
    return {
        each["label"]: (f"{100 * before[each['label']]:.1f} %", f"{100 * each['score']:.1f} %")
        for each in result["scores"]
    }


def expect_result(page: Page, text: str) -> None:
    expect(page.locator(".result")).to_contain_text(text)


def test_scores_and_changes_are_those_of_the_api(server: RunningServer, window: OpenWindow) -> None:
    page = window(server, viewport=NARROW).open()
    expect(page.get_by_text("Nothing to classify yet")).to_be_visible()
    page.get_by_role("group", name="Examples").get_by_role("button", name="Sport", exact=True).click()
    expect(page.locator(".result")).to_contain_text("Nothing is erased: choose a concept")
    assert page.locator(".scores thead th").all_inner_texts() == ["Label", "Score"]
    page.get_by_label("Sports").check(force=True)
    expect_result(page, "masked at the read position")
    text = page.get_by_label("Text").input_value()
    from_api = expected_scores(server, text, erase=["Sports"])
    found = scores(page)
    assert {label: cells[:2] for label, cells in found.items()} == from_api
    for label, (before, after, change) in found.items():
        moved = float(after[:-2]) - float(before[:-2])
        shown = float(change.removesuffix(" pp").replace("−", "-"))
        assert shown == pytest.approx(moved, abs=0.11), label
    (result,) = server.classify(text, erase=["Sports"]).json()["results"]
    expect_result(page, f"{result['masked_neurons']} neuron")
    assert ("At chance" in page.locator(".result").inner_text()) == result["at_chance"]
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        assert_no_horizontal_scroll(page)


def test_every_control_is_sent_with_the_request(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open()
    page.get_by_label("Text").fill(TEXT)
    page.get_by_label("Sci/Tech").check(force=True)
    page.get_by_label("Météo & co").check(force=True)
    page.get_by_label("τ, half-width").fill("1.5")
    page.get_by_label("Share of neurons").fill("50")
    page.get_by_label("Block").select_option("1")
    page.get_by_label("Ranking").select_option("selectivity")
    page.get_by_label("Masked neurons become").select_option("damp")
    damped = '"damp":0.25'  # other requests are sent while the controls are set
    with page.expect_request(lambda request: damped in (request.post_data or "")) as request:
        page.get_by_label("Remaining part").fill("25")
    erase = request.value.post_data_json["erase"]
    assert erase == {
        "concepts": ["Sci/Tech", "Météo & co"],
        "method": "range",
        "tau": 1.5,
        "top_fraction": 0.5,
        "ranking": "selectivity",
        "layer": 1,
        "replacement": {"damp": 0.25},
    }
    with page.expect_request("**/v1/classify") as request:
        page.get_by_text("Neuron", exact=True).click()
    assert request.value.post_data_json["erase"]["method"] == "neuron"
    expect(page.get_by_label("τ, half-width")).to_be_hidden()
    with page.expect_request("**/v1/classify") as request:
        page.get_by_label("Block").select_option("all")
    assert request.value.post_data_json["erase"]["layer"] == [1, 2]


def test_late_response_does_not_replace_a_newer_one(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect_result(page, "masked")
    held: list[Route] = []
    ended: list[Request] = []

    def hold_the_half(route: Route) -> None:
        if route.request.post_data_json["erase"]["top_fraction"] == 0.5:
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/classify", hold_the_half)
    page.on("requestfinished", lambda request: ended.append(request))
    page.on("requestfailed", lambda request: ended.append(request))
    slider = page.get_by_label("Share of neurons")
    with page.expect_request("**/v1/classify"):
        slider.fill("50")
    slider.fill("100")
    expect_result(page, "32 neurons masked")
    (route,) = held
    route.continue_()

    def first_request_ended() -> bool:
        page.evaluate("0")  # lets events of the browser arrive
        return route.request in ended

    until(first_request_ended)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    expect_result(page, "32 neurons masked")


def test_address_is_not_updated_too_often(server: RunningServer, window: OpenWindow) -> None:
    """A browser refuses an address that changes too often, which its log would show as an error."""
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect_result(page, "masked")
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
    expect_result(page, "32 neurons masked")
    page.wait_for_url("**top=1")


def test_new_result_keeps_focus_and_opened_details(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&method=neuron")
    expect_result(page, "9 neurons masked")
    page.locator(".result summary").click()
    page.get_by_role("button", name="Copy link").focus()
    page.evaluate(
        """() => {
          const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === "100");
          slider.value = "100";
          slider.dispatchEvent(new Event("input"));
        }"""
    )
    expect_result(page, "32 neurons masked")
    expect(page.locator(".result li")).to_be_visible()
    expect(page.get_by_role("button", name="Copy link")).to_be_focused()


def test_link_shares_the_state_but_not_the_key(
    server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore], window: OpenWindow
) -> None:
    running, tokens, _ = server_with_keys
    first = window(running).open(f"#/try?text={TEXT}")
    enter_key(first, tokens["read"])
    expect(first.locator(".result")).to_contain_text("Not allowed with this key")
    first.get_by_role("button", name="Use another key").click()
    enter_key(first, tokens["admin"])
    first.get_by_label("World").check(force=True)
    first.get_by_label("τ, half-width").fill("0.7")
    expect_result(first, "within ±0.7 σ")
    assert "nl_" not in first.url
    assert tokens["admin"] not in first.content()
    kept = first.evaluate("[JSON.stringify(localStorage), document.cookie]")
    assert tokens["admin"] not in str(kept)
    first.wait_for_url("**tau=0.7*")
    address, found = first.url, scores(first)
    other = window(running).page
    other.goto(address)
    enter_key(other, tokens["admin"])
    expect_result(other, "within ±0.7 σ")
    assert scores(other) == found
    expect(other.get_by_label("World")).to_be_checked()
    expect(other.get_by_label("Text")).to_have_value(TEXT)


RECORD_COPIED = """() => new MutationObserver(() => { window.copied ||= document.body.innerText.includes("Copied"); })
  .observe(document.body, { childList: true, subtree: true, characterData: true })"""
"""Records that the page showed "Copied", which it does for a moment only."""
HOSTILE = 'it\'s "quoted" $HOME `id` \\ %s ! \n <b>é</b> \u202eabc 🎈'


@pytest.fixture(params=["server", "server_with_keys"])
def server_and_token(request: pytest.FixtureRequest) -> tuple[RunningServer, str | None]:
    """A server without keys and no token, or a server with keys and an admin's token."""
    if request.param == "server":
        return request.getfixturevalue("server"), None
    running, tokens, _ = request.getfixturevalue("server_with_keys")
    return running, tokens["admin"]


def test_copied_command_and_program_give_the_same_answer(
    server_and_token: tuple[RunningServer, str | None], window: OpenWindow
) -> None:
    running, token = server_and_token
    page = window(running, permissions=["clipboard-read", "clipboard-write"]).open()
    if token:
        enter_key(page, token)
    page.get_by_label("Text").fill(HOSTILE)
    page.get_by_label("Sports").check(force=True)
    expect_result(page, "masked at the read position")
    found = scores(page)
    environment = {**os.environ, "NEURONLENS_API_KEY": token or ""}
    page.evaluate(RECORD_COPIED)
    page.get_by_role("button", name="Copy as curl").click()
    until(lambda: page.evaluate("window.copied"))  # the page's policy forbids wait_for_function with a string
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


def test_controls_show_the_settings_of_the_request(server: RunningServer, window: OpenWindow) -> None:
    """Even if the default ranking was not fitted, or the link names a block that was not."""
    identity = server.service.model.identity
    fitted = random_range_set(
        5, ("Sports",), hidden=32, n_layers=3, layers=[1], rankings=["selectivity"], fingerprint=identity.fingerprint
    )
    server.service.store.activate(server.service.store.range_sets.publish(*fitted))
    server.service.mirror.refresh()
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports")
    expect_result(page, "masked at the read position")
    expect(page.get_by_label("Ranking")).to_have_value("selectivity")
    page = window(server).open(f"#/try?text={TEXT}&erase=Sports&layer=2&ranking=max")
    expect_result(page, "layer 2 not fitted")
    expect(page.get_by_label("Block")).to_have_value("2")
    page.get_by_label("Block").select_option("1")
    expect_result(page, "masked at the read position")


def test_command_is_shown_if_there_is_no_clipboard(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy as curl").click()
    assert page.get_by_role("dialog").get_by_label("curl command").input_value().startswith("curl -s http://127.0.0.1")


def test_live_erasures_are_applied_and_followed(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open(f"#/try?text={TEXT}")
    page.get_by_text("Live erasures").click()
    expect(page.get_by_text("Live now: nothing")).to_be_visible()
    server.http.put("/v1/erasures/Business", json={"method": "neuron", "top_fraction": 1.0})
    expect(page.get_by_text("Live now: Business")).to_be_visible()
    expect_result(page, "32 neurons masked")
    expect(page.get_by_text(re.compile("Applied: 1 erasure, live"))).to_be_visible()


def test_enforced_erasure_hides_the_baseline_from_an_infer_key(
    server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore], window: OpenWindow
) -> None:
    running, tokens, _ = server_with_keys
    running.service.store.set_erasure(LiveErasure(erasure=Erasure(concept="World"), enforced=True))
    running.service.mirror.refresh()
    page = window(running).open(f"#/try?text={TEXT}")
    enter_key(page, tokens["infer"])
    expect_result(page, "the scores without it need a key with scope admin")
    assert all(len(cells) == 1 for cells in scores(page).values())
    expect(page.locator("main")).to_contain_text("needs a key with scope read")
