"""Texts of users are texts: nothing that they hold is run, or turns the page around."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import NARROW, Window
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer
from tests.workers.checkpoints import save_tiny
from workers.models.loading import load_model

pytestmark = pytest.mark.system
Open = Callable[..., Window]

IMAGE = "<img src=x onerror='window.pwned=1'>"
NAMES = (
    IMAGE,
    "</script><script>window.pwned=1</script>",
    "\u202eright to left \u05d0\u05d1\u05d2",
    "x" * 400,
    "javascript:window.pwned=1//\"'`${1}",
    "<b>&amp;</b>\n\u0007 %s",
    ".",
    "..",
)


@pytest.fixture(scope="package")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_model(str(save_tiny("bert", tmp_path_factory.mktemp("odd") / "odd", labels=NAMES)), device="cpu")


@pytest.fixture
def odd(start_server: Callable[..., RunningServer], odd_model: object) -> RunningServer:
    """A server whose labels and concepts are hostile."""
    running = start_server(odd_model, name=IMAGE)
    identity = running.service.model.identity
    ranges = random_range_set(3, NAMES, hidden=32, n_layers=3, fingerprint=identity.fingerprint)
    running.service.store.activate(running.service.store.publish(*ranges))
    running.service.mirror.refresh()
    return running


def harmless(page: Page) -> None:
    assert page.evaluate("window.pwned ?? null") is None
    assert page.locator("img[src=x], main script, main b").count() == 0


def test_names_and_reasons(
    odd: RunningServer, window: Open, no_sideways: Callable[[Page], None], tmp_path: Path
) -> None:
    for at, name in enumerate(NAMES[:4]):
        odd.http.put(
            "/v1/erasures",
            json={"erasures": [{"concept": each, "reason": (name * 20)[:500]} for each in NAMES[: at + 1]]},
        ).raise_for_status()
    page = window(odd, viewport=NARROW).open("#/live")
    expect(page.get_by_role("heading", name=IMAGE)).to_be_visible()
    no_sideways(page)
    page.get_by_role("button", name=f"Change {IMAGE}").click()
    page.get_by_role("dialog").get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name=f"Switch off {IMAGE}").click()
    page.get_by_role("dialog").get_by_label("Reason").fill(IMAGE)
    page.get_by_role("button", name="Switch it off for everybody").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("heading", name=IMAGE)).to_be_hidden()
    harmless(page)
    page.get_by_text("Provenance").first.click()
    expect(page.get_by_text(f"corpus.counts.{IMAGE}")).to_be_visible()
    harmless(page)
    no_sideways(page)

    page.get_by_role("link", name="Neurons").click()
    for name in NAMES:
        page.get_by_label("Concept", exact=True).select_option(name)
        expect(page.locator(".ranked [data-neuron]").first).to_be_visible()
    plots = page.locator(".js-plotly-plot .main-svg")
    expect(plots.first).to_be_visible()
    expect(page.get_by_role("region", name="Overlap").locator("text", has_text="<img src=x").first).to_be_attached()
    for summary in page.get_by_text("The same as numbers").all():
        summary.click()
    harmless(page)
    no_sideways(page)


@pytest.mark.parametrize("name", [".", ".."])
def test_a_name_that_browsers_resolve_in_a_path(odd: RunningServer, window: Open, name: str) -> None:
    odd.http.put("/v1/erasures", json={"erasures": [{"concept": "x" * 400, "reason": "another"}]}).raise_for_status()
    (other,) = odd.http.get("/v1/erasures").json()["erasures"]
    page = window(odd).open("#/live")
    page.get_by_role("button", name="Switch on…").click()
    page.get_by_role("dialog").get_by_label("Concept").select_option(name)
    page.get_by_role("button", name="Switch it on for everybody").click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    page.get_by_role("button", name=f"Change {name}", exact=True).click()
    page.get_by_role("dialog").get_by_label("Reason").fill("why not")
    page.get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_text("why not")).to_be_visible()
    now = odd.http.get("/v1/erasures").json()["erasures"]
    assert {each["concept"]: each["reason"] for each in now} == {"x" * 400: "another", name: "why not"}
    page.get_by_role("button", name=f"Switch off {name}", exact=True).click()
    page.get_by_role("button", name="Switch it off for everybody").click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_hidden()
    assert odd.http.get("/v1/erasures").json()["erasures"] == [other]
    page.get_by_role("link", name="Neurons").click()
    page.get_by_label("Concept", exact=True).select_option(name)
    expect(page.locator(".ranked caption")).to_contain_text(f"Neurons of {name} by rank")


@pytest.mark.parametrize(
    "text",
    [
        IMAGE,
        "</textarea></script><script>window.pwned=1</script>",
        "\u202e\u05e9\u05dc\u05d5\u05dd " * 30,
        "wide" * 20_000,
        "half a pair: \ud83d and a whole one 🎈 and \x00\x07",
    ],
    ids=["image", "script", "rtl", "long", "surrogates"],
)
def test_texts(odd: RunningServer, window: Open, no_sideways: Callable[[Page], None], text: str) -> None:
    page = window(odd, viewport=NARROW).open()
    expect(page.get_by_label("Text")).to_be_visible()
    units = text.encode("utf-16-le", "surrogatepass")
    page.evaluate(
        """(codes) => {
          const field = document.querySelector("textarea");
          field.value = codes.map((code) => String.fromCharCode(code)).join("");
          field.dispatchEvent(new Event("input"));
        }""",
        [int.from_bytes(units[at : at + 2], "little") for at in range(0, len(units), 2)],
    )
    page.locator(".tick label").first.click()
    expect(page.locator(".result")).to_contain_text("masked at the read position")
    harmless(page)
    no_sideways(page)
    page.wait_for_function("() => location.hash.includes('erase=')")
    page.reload()  # the address holds it now
    expect(page.locator(".result")).to_contain_text("masked at the read position")
    harmless(page)


def test_an_address_that_somebody_made_up(odd: RunningServer, window: Open) -> None:
    for address in (
        f"#/try?text={IMAGE}&erase={IMAGE}&erase=nobody&tau=-1&top=9&layer=99&ranking=__proto__&replacement=toString",
        f"#/neurons?concept={IMAGE}&layer=x&neuron=99999&tau=1e9",
        f"#/evaluation?report={IMAGE}/../..",
        "#/__proto__?%ff=%",
        "#/constructor",
    ):
        page = window(odd).open(address)
        expect(page.locator("main .card").first).to_be_visible()
        harmless(page)
