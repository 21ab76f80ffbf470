"""Takes docs/console-*.png, the pictures of the console, from the demo: `make screenshots` (needs chromium)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

HERE = Path(__file__).parent
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
TEXT = "Ministers of thirty states agreed to limit satellites that cross the sky at night."
WIDE = (1280, 800)
NARROW = (390, 844)


def demo(folder: str) -> tuple[subprocess.Popen[str], str]:
    """The demo as a process, and where it serves; what it made before is kept."""
    command = [
        Path(sys.executable).parent / "neuronlens",
        "demo",
        "--port",
        "0",
        *(["--cache-dir", folder] if folder else []),
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"serving .* at (http://\S+)", line):
            return process, found[1]
    raise RuntimeError("the demo did not start")


def take(browser: Browser, url: str, name: str, address: str, ready: str, size: tuple[int, int], scheme: str) -> None:
    """One picture of a part, once it holds the words `ready`."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)  # type: ignore[arg-type]
    page: Page = context.new_page()
    page.goto(f"{url}/{address}")
    expect(page.locator("main")).to_contain_text(ready, timeout=30_000)
    expect(page.locator("#connection")).to_have_text("following", timeout=30_000)
    for plot in page.locator(".chart").all():
        expect(plot.locator(".main-svg").first).to_be_visible(timeout=30_000)
    page.wait_for_load_state("load")
    page.evaluate("document.fonts.ready")
    out = HERE / f"console-{name}.png"
    page.screenshot(path=out, animations="disabled")
    context.close()
    print(f"{out.relative_to(HERE.parent)}: {out.stat().st_size / 1000:.0f} kB")


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium on this machine: apt-get install chromium")
    process, url = demo(sys.argv[1] if len(sys.argv) > 1 else "")
    text = TEXT.replace(" ", "+")
    tried = f"#/try?text={text}&erase=World&ranking=selectivity"
    neuron = f"#/neurons?concept=World&ranking=selectivity&text={text}"
    masked = "masked at the read position"
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            take(browser, url, "try", tried, masked, WIDE, "light")
            take(browser, url, "narrow", tried, masked, NARROW, "dark")
            take(browser, url, "neurons", neuron, "The text of Try has the value", WIDE, "dark")
            put = {"top_fraction": 0.6, "reason": "ticket 214: no sport in the business feed", "expires_in": 28800}
            httpx.put(f"{url}/v1/erasures/Sports", json=put).raise_for_status()
            enforced = {"enforced": True, "reason": "agreed with the desk"}
            httpx.put(f"{url}/v1/erasures/World", json=enforced).raise_for_status()
            take(browser, url, "live", "#/live", "Provenance", WIDE, "light")
            browser.close()
    finally:
        for concept in ("Sports", "World"):
            httpx.delete(f"{url}/v1/erasures/{concept}")
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
