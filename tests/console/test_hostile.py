"""Hostile texts are shown as texts: nothing in them is executed, and none breaks the layout."""

from collections.abc import Iterator

import pytest
import redis
from playwright.sync_api import Page, expect

from tests.console.conftest import NARROW, OpenWindow, assert_no_horizontal_scroll
from tests.range_store.builders import random_range_set
from tests.servers import RunningServer, starting
from tests.workers.checkpoints import save_tiny
from workers.models.loading import LoadedModel, load_model

pytestmark = pytest.mark.system

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


@pytest.fixture(scope="module")
def hostile_server_of_module(
    request: pytest.FixtureRequest,
    redis_client: redis.Redis,
    model: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("hostile")
    loaded = load_model(str(save_tiny("bert", directory / "model", labels=NAMES)), device="cpu")
    with starting(request, redis_client, model, directory) as start:
        running = start(loaded, name=IMAGE)
        store = running.service.store
        fingerprint = running.service.model.identity.fingerprint
        store.activate(
            store.range_sets.publish(*random_range_set(3, NAMES, hidden=32, n_layers=3, fingerprint=fingerprint))
        )
        running.service.mirror.refresh()
        yield running


@pytest.fixture
def hostile_server(hostile_server_of_module: RunningServer) -> RunningServer:
    """A server whose name, labels and concepts are hostile; nothing is erased."""
    hostile_server_of_module.service.store.set_erasures([])
    hostile_server_of_module.service.mirror.refresh()
    return hostile_server_of_module


def assert_nothing_executed(page: Page) -> None:
    assert page.evaluate("window.pwned ?? null") is None
    assert page.locator("img[src=x], main script, main b").count() == 0


def test_hostile_names_and_reasons_are_shown_as_text(hostile_server: RunningServer, window: OpenWindow) -> None:
    erasures = [{"concept": name, "reason": (NAMES[3] * 20)[:500]} for name in NAMES[:4]]
    hostile_server.http.put("/v1/erasures", json={"erasures": erasures}).raise_for_status()
    page = window(hostile_server, viewport=NARROW).open("#/live")
    expect(page.get_by_role("heading", name=IMAGE)).to_be_visible()
    assert_no_horizontal_scroll(page)
    page.get_by_role("button", name=f"Change {IMAGE}").click()
    page.get_by_role("dialog").get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name=f"Switch off {IMAGE}").click()
    page.get_by_role("dialog").get_by_label("Reason").fill(IMAGE)
    page.get_by_role("button", name="Switch it off for everybody").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("heading", name=IMAGE)).to_be_hidden()
    assert_nothing_executed(page)
    page.get_by_text("Provenance").first.click()
    expect(page.get_by_text(f"corpus.counts.{IMAGE}")).to_be_visible()
    assert_nothing_executed(page)
    assert_no_horizontal_scroll(page)

    page.get_by_role("link", name="Neurons").click()
    for name in NAMES:
        page.get_by_label("Concept", exact=True).select_option(name)
        expect(page.locator(".ranked [data-neuron]").first).to_be_visible()
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    expect(page.get_by_role("region", name="Overlap").locator("text", has_text="<img src=x").first).to_be_attached()
    for summary in page.get_by_text("Show as a table").all():
        summary.click()
    assert_nothing_executed(page)
    assert_no_horizontal_scroll(page)


@pytest.mark.parametrize("name", [".", ".."])
def test_dot_names_are_not_resolved_in_paths(hostile_server: RunningServer, window: OpenWindow, name: str) -> None:
    http = hostile_server.http
    http.put("/v1/erasures", json={"erasures": [{"concept": "x" * 400, "reason": "another"}]}).raise_for_status()
    (other,) = http.get("/v1/erasures").json()["erasures"]
    page = window(hostile_server).open("#/live")
    page.get_by_role("button", name="Switch on…").click()
    page.get_by_role("dialog").get_by_label("Concept").select_option(name)
    page.get_by_role("button", name="Switch it on for everybody").click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    page.get_by_role("button", name=f"Change {name}", exact=True).click()
    page.get_by_role("dialog").get_by_label("Reason").fill("why not")
    page.get_by_role("button", name="Change it for everybody").click()
    expect(page.get_by_text("why not")).to_be_visible()
    erasures = http.get("/v1/erasures").json()["erasures"]
    assert {each["concept"]: each["reason"] for each in erasures} == {"x" * 400: "another", name: "why not"}
    page.get_by_role("button", name=f"Switch off {name}", exact=True).click()
    page.get_by_role("button", name="Switch it off for everybody").click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_hidden()
    assert http.get("/v1/erasures").json()["erasures"] == [other]
    page.get_by_role("link", name="Neurons").click()
    page.get_by_label("Concept", exact=True).select_option(name)
    expect(page.locator(".ranked caption")).to_contain_text(f"Neurons of {name} by rank")


@pytest.mark.parametrize(
    "text",
    [
        f"{IMAGE}</textarea></script><script>window.pwned=1</script>" + "\u202e\u05e9\u05dc\u05d5\u05dd " * 30,
        "wide" * 20_000,
        "half a pair: \ud83d and a whole one 🎈 and \x00\x07",
    ],
    ids=["html and right to left", "long", "surrogates"],
)
def test_hostile_text_is_classified_and_kept_in_the_address(
    hostile_server: RunningServer, window: OpenWindow, text: str
) -> None:
    page = window(hostile_server, viewport=NARROW).open()
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
    assert_nothing_executed(page)
    assert_no_horizontal_scroll(page)
    page.wait_for_function("() => location.hash.includes('erase=')")
    page.reload()
    expect(page.locator(".result")).to_contain_text("masked at the read position")
    assert_nothing_executed(page)


def test_made_up_address_shows_a_part_and_executes_nothing(hostile_server: RunningServer, window: OpenWindow) -> None:
    opened = window(hostile_server)
    for address in (
        f"#/try?text={IMAGE}&erase={IMAGE}&erase=nobody&tau=-1&top=9&layer=99&ranking=__proto__&replacement=toString",
        f"#/neurons?concept={IMAGE}&layer=x&neuron=99999&tau=1e9",
        f"#/evaluation?report={IMAGE}/../..",
        "#/__proto__?%ff=%",
        "#/constructor",
    ):
        opened.page.goto("about:blank")
        page = opened.open(address)
        expect(page.locator("main .card").first).to_be_visible()
        assert_nothing_executed(page)
