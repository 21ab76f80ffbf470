"""Evaluation: reports open in place, in a frame from which their scripts reach nothing."""

import pytest
from playwright.sync_api import expect

from range_store.storage.api_keys import ApiKeyStore
from tests.console.conftest import NARROW, WIDE, OpenWindow, assert_no_horizontal_scroll, enter_key
from tests.servers import RunningServer

pytestmark = pytest.mark.system

HOSTILE_REPORT = """<!doctype html><title>hostile</title><body><script>
const attempts = {
  parent: () => { parent.document.title = "reached"; },
  mark: () => { parent.pwned = 1; },
  key: () => parent.sessionStorage.length,
  storage: () => sessionStorage.length,
  leave: () => { top.location.href = "/docs"; },
};
const blocked = [];
for (const [name, attempt] of Object.entries(attempts)) {
  try { attempt(); } catch { blocked.push(name); }
}
fetch("/livez").catch(() => blocked.push("fetch")).then(() => {
  const image = new Image();
  image.onerror = () => { blocked.push("image"); document.body.textContent = `blocked: ${blocked.join(" ")}`; };
  image.src = "/console/icon.svg";
});
</script>"""


def test_report_opens_in_place(server_with_evaluation: RunningServer, window: OpenWindow) -> None:
    page = window(server_with_evaluation, viewport=NARROW).open("#/evaluation")
    item = page.get_by_role("listitem").filter(has_text="tiny & <b>small")
    expect(item).to_contain_text("60 texts")
    item.get_by_role("button", name="Open").click()
    frame = page.frame_locator("iframe")
    expect(frame.locator("h1")).to_be_visible()
    expect(frame.locator(".js-plotly-plot .main-svg").first).to_be_attached()
    for size in (NARROW, WIDE):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        assert_no_horizontal_scroll(page)
    page.wait_for_function("() => location.hash.includes('report=')")
    page.reload()  # the address says which report is open
    expect(frame.locator("h1")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.locator("iframe")).to_have_count(0)


def test_report_script_cannot_leave_its_frame(
    server_with_keys: tuple[RunningServer, dict[str, str], ApiKeyStore], window: OpenWindow
) -> None:
    running, tokens, _ = server_with_keys
    folder = running.service.settings.reports / "hostile"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text(HOSTILE_REPORT, "utf-8")
    opened = window(running)
    page = opened.open("#/evaluation")
    enter_key(page, tokens["read"])
    item = page.get_by_role("listitem").filter(has_text="hostile")
    expect(item).to_contain_text("incomplete")
    item.get_by_role("button", name="Open").click()
    blocked = page.frame_locator("iframe").get_by_text("blocked:")
    expect(blocked).to_have_text("blocked: parent mark key storage leave fetch image")
    assert "#/evaluation" in page.url
    assert all("Content Security Policy" in error or "sandbox" in error for error in opened.errors), opened.errors
    opened.errors.clear()  # they come from the report's attempts


def test_empty_list_says_how_to_make_a_report(server: RunningServer, window: OpenWindow) -> None:
    page = window(server).open("#/evaluation")
    expect(page.get_by_text("No reports yet")).to_be_visible()
