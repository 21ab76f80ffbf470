"""axe finds no serious fault in any part of the console, in any of its states.

`make test-system` checks the dark, narrow look; `make test-full` checks the other three.
"""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Route, expect

from range_store.storage.api_keys import ApiKeyStore
from tests.console.conftest import NARROW, WIDE, OpenWindow, Window, start_long_fit
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer

Look = dict[str, object]
PARTS = {
    "#/try": "Nothing to classify yet",
    "#/try?text=a+goal+in+the+last+minute&erase=Sports": "masked at the read position",
    "#/live": "since",
    "#/neurons": "The share of a concept",
    "#/evaluation": "Reports",
}


def look(scheme: str, size: dict[str, int], mark: pytest.MarkDecorator) -> object:
    options = {"color_scheme": scheme, "viewport": size, "reduced_motion": "reduce"}
    return pytest.param(options, id=f"{scheme}-{'narrow' if size is NARROW else 'wide'}", marks=mark)


in_each_look = pytest.mark.parametrize(
    "options",
    [
        look("dark", NARROW, pytest.mark.system),
        look("dark", WIDE, pytest.mark.full),
        look("light", NARROW, pytest.mark.full),
        look("light", WIDE, pytest.mark.full),
    ],
)


def check(window: Window, state: str) -> None:
    violations = Axe().run(window.page).response["violations"]
    serious = [
        f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']][:3]}"
        for each in violations
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious, (state, serious)


@in_each_look
def test_parts_are_accessible(server: RunningServer, window: OpenWindow, options: Look) -> None:
    server.http.put("/v1/erasures/Business", json={"reason": "why not", "enforced": True})
    opened = window(server, **options)
    for address, text in PARTS.items():
        page = opened.open(address)
        page.reload()  # a new fragment alone does not load the page again
        expect(page.locator("main")).to_contain_text(text)
        if "neurons" in address:
            expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
        for summary in page.locator("main summary").all():
            summary.click()
        check(opened, address)
    opened.open("#/live").get_by_role("button", name="Change Business").click()
    expect(opened.page.get_by_role("dialog")).to_be_visible()
    check(opened, "dialog")


CONTRAST = """(element) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    const linear = [r, g, b].map((byte) => {
      const part = byte / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return a ? 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] : null;
  };
  const text = luminance(getComputedStyle(element).color);
  let behind = null;
  for (let at = element; behind === null; at = at.parentElement) {
    behind = luminance(getComputedStyle(at).backgroundColor);
  }
  return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
}"""


@in_each_look
def test_buttons_keep_their_contrast_under_the_pointer(
    server: RunningServer, window: OpenWindow, options: Look
) -> None:
    server.http.put("/v1/erasures/Business", json={"enforced": True})
    opened = window(server, **options)
    for address, button in (
        ("#/try?text=a+goal", "Copy link"),
        ("#/live", "Switch off Business"),
        ("#/neurons", "Next"),
    ):
        page = opened.open(address)
        page.reload()
        expect(page.get_by_role("button", name=button)).to_be_visible()
        if "neurons" in address:
            expect(page.locator(".pick[aria-pressed=true]")).to_be_visible()
        for each in page.locator("button:enabled:visible").all():
            each.hover()
            assert each.evaluate(CONTRAST) >= 4.5, each.inner_text()


@in_each_look
def test_errors_and_loading_states_are_accessible(server: RunningServer, window: OpenWindow, options: Look) -> None:
    opened = window(server, **options)
    page = opened.page
    problem = '{"code": "store_unavailable", "detail": "the store is away", "status": 503, "request_id": "abc"}'
    page.route("**/v1/events", lambda route: route.fulfill(status=404, body="{}"))
    page.route("**/v1/range-sets", lambda route: route.fulfill(status=503, body=problem))
    opened.open("#/live")
    expect(page.get_by_role("alert").filter(has_text="the store is away")).to_be_visible()
    check(opened, "an error")

    waiting: list[Route] = []
    page.route("**/v1/neurons/**", lambda route: waiting.append(route))
    page.get_by_role("link", name="Neurons").click()
    expect(page.get_by_text("Loading the neuron")).to_be_visible()
    expect(page.locator(".ranked")).to_be_visible()
    check(opened, "loading")

    opened.disconnect()
    page.get_by_role("link", name="Evaluation").click()
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("main .problem")).to_be_visible()
    check(opened, "connection lost")


@in_each_look
def test_key_dialog_is_accessible(
    server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore], window: OpenWindow, options: Look
) -> None:
    opened = window(server_with_keys[0], **options)
    expect(opened.open("#/live").get_by_role("dialog", name="API key")).to_be_visible()
    check(opened, "key dialog")


@pytest.mark.full
@pytest.mark.parametrize("options", [{"color_scheme": "dark", "viewport": NARROW}, {"color_scheme": "light"}])
def test_empty_server_with_a_running_fit_is_accessible(
    fitting_server: RunningServer, window: OpenWindow, options: Look
) -> None:
    job = start_long_fit(fitting_server)
    opened = window(fitting_server, **options)
    for address, text in {
        "#/live": "news/long.jsonl",
        "#/try": "None: no range set",
        "#/neurons": "No range set is active",
        "#/evaluation": "No reports yet",
    }.items():
        expect(opened.open(address).locator("main")).to_contain_text(text)
        check(opened, f"{address} of an empty server")
    assert fitting_server.http.delete(f"/v1/jobs/{job}").status_code in (200, 409)  # 409: it has ended already


@in_each_look
def test_comparison_is_accessible(fresh_server: RunningServer, window: OpenWindow, options: Look) -> None:
    service = fresh_server.service
    fingerprint = service.model.identity.fingerprint
    made = random_range_set(7, ("Sports", "World"), hidden=32, n_layers=3, fingerprint=fingerprint)
    service.store.range_sets.publish(*made)
    opened = window(fresh_server, **options)
    page = opened.open("#/live")
    expect(page.get_by_label("Compare")).to_have_count(2)
    for box in page.get_by_label("Compare").all():
        box.check()
    page.get_by_text("Provenance", exact=True).first.click()
    expect(page.get_by_role("region", name="Comparison")).to_be_visible()
    check(opened, "comparison")


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_report_is_accessible(server_with_evaluation: RunningServer, window: OpenWindow, scheme: str) -> None:
    opened = window(server_with_evaluation, color_scheme=scheme)
    page = opened.open("#/evaluation")
    page.get_by_role("button", name="Open tiny").click()
    expect(page.frame_locator("iframe").locator("h1")).to_be_visible()
    check(opened, "report")
