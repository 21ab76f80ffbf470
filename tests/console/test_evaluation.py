"""Evaluation: reports open in place, in a frame from which their scripts reach nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from range_store.api_keys import KeyStore
from tests.console.conftest import NARROW, WIDE, Window
from tests.servers import RunningServer

pytestmark = pytest.mark.system
Open = Callable[..., Window]

TRIES = """<!doctype html><title>tries</title><body><script>
const tries = {
  parent: () => { parent.document.title = "reached"; },
  mark: () => { parent.pwned = 1; },
  key: () => parent.sessionStorage.length,
  storage: () => sessionStorage.length,
  leave: () => { top.location.href = "/docs"; },
};
const held = [];
for (const [name, what] of Object.entries(tries)) {
  try { what(); } catch { held.push(name); }
}
fetch("/livez").catch(() => held.push("fetch")).then(() => {
  const image = new Image();
  image.onerror = () => { held.push("image"); document.body.textContent = `held: ${held.join(" ")}`; };
  image.src = "/console/icon.svg";
});
</script>"""


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_a_report_opens_in_place(
    start_server: Callable[..., RunningServer],
    window: Open,
    report: Path,
    no_sideways: Callable[..., None],
    size: dict[str, int],
) -> None:
    running = start_server(reports_dir=report)
    page = window(running, viewport=size).open("#/evaluation")
    item = page.get_by_role("listitem").filter(has_text="tiny & <b>small")
    expect(item).to_contain_text("60 texts")
    item.get_by_role("button", name="Open").click()
    inside = page.frame_locator("iframe")
    expect(inside.locator("h1")).to_be_visible()
    expect(inside.locator(".js-plotly-plot .main-svg").first).to_be_attached()
    no_sideways(page)
    page.wait_for_function("() => location.hash.includes('report=')")
    page.reload()  # the address says which report is open
    expect(inside.locator("h1")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.locator("iframe")).to_have_count(0)


def test_a_report_reaches_nothing(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore], window: Open
) -> None:
    running, tokens, _ = server_with_keys
    hostile = running.service.settings.reports / "hostile"
    hostile.mkdir(parents=True)
    (hostile / "report.html").write_text(TRIES, "utf-8")
    mine = window(running)
    page = mine.open("#/evaluation")
    page.get_by_label("Key", exact=True).fill(tokens["read"])
    page.get_by_role("button", name="Use it").click()
    item = page.get_by_role("listitem").filter(has_text="hostile")
    expect(item).to_contain_text("incomplete")
    item.get_by_role("button", name="Open").click()
    held = page.frame_locator("iframe").get_by_text("held:")
    expect(held).to_have_text("held: parent mark key storage leave fetch image")
    assert "#/evaluation" in page.url
    assert all("Content Security Policy" in fault or "sandbox" in fault for fault in mine.faults), mine.faults
    mine.faults.clear()  # of the report's own tries


def test_without_any_the_page_says_how_to_make_one(server: RunningServer, window: Open) -> None:
    page = window(server).open("#/evaluation")
    expect(page.get_by_text("No reports yet")).to_be_visible()
