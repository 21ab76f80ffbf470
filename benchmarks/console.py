"""How quick the console feels, in a real browser: `python benchmarks/console.py URL` on a running demo without keys.

Prints how long after a change another window shows it, and how long after a slider is moved its answer stands there.
"""

import shutil
import statistics
import sys
import time

import httpx
from playwright.sync_api import Page, sync_playwright

CHANGES, MOVES = 20, 40
WATCH = """() => {
  window.changed = 0;
  new MutationObserver(() => { window.changed ||= performance.timeOrigin + performance.now(); })
    .observe(document.querySelector("#main"), { childList: true, subtree: true });
}"""
MOVE = """async (value) => {
  const slider = [...document.querySelectorAll("input[type=range]")].find((each) => each.max === "100");
  const began = performance.now();
  const answered = new Promise((done) => {
    const watching = new MutationObserver(() => { watching.disconnect(); done(); });
    watching.observe(document.querySelector(".result"), { childList: true });
  });
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  await answered;
  return performance.now() - began;
}"""


def following(page: Page, url: str) -> list[float]:
    """Milliseconds from before a change until another window shows it."""
    page.goto(f"{url}/#/live")
    page.wait_for_selector("text=Nothing is erased")
    page.wait_for_function("document.querySelector('#connection').dataset.state === 'good'")
    page.evaluate(WATCH)
    took = []
    for change in range(CHANGES):
        page.evaluate("window.changed = 0")
        began = 1000 * time.time()
        httpx.request("DELETE" if change % 2 else "PUT", f"{url}/v1/erasures/Sports").raise_for_status()
        page.wait_for_function("window.changed > 0")
        took.append(page.evaluate("window.changed") - began)
        time.sleep(0.3)  # what else the page draws of this change is no part of the next one
    return took


def sliding(page: Page, url: str) -> list[float]:
    """Milliseconds from a slider's move until its answer is shown, the page's own 60 ms of waiting included."""
    page.goto(f"{url}/#/try?text=Ministers+of+thirty+states+agreed+to+limit+satellites.&erase=World")
    page.wait_for_selector(".scores")
    return [page.evaluate(MOVE, 10 + 2 * move) for move in range(MOVES)]


def main() -> None:
    url = sys.argv[1].rstrip("/")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for what, measure in (("another window shows a change", following), ("a slider's answer", sliding)):
            took = sorted(measure(browser.new_context().new_page(), url))
            print(f"{what}: median {statistics.median(took):.0f} ms, worst {took[-1]:.0f} ms of {len(took)}")
        browser.close()


if __name__ == "__main__":
    main()
