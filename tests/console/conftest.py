"""A real browser on the console of a real server; whatever the page does wrong fails the test."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Locator,
    Page,
    Playwright,
    Request,
    Route,
    expect,
    sync_playwright,
)

from app.cli import run
from tests.servers import RunningServer
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`);
});
"""
NARROW = {"width": 390, "height": 844}
WIDE = {"width": 1440, "height": 900}
GENEROUS = 20_000
"""Milliseconds that anything may take on a busy machine; the page itself waits for none of it."""


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="package")
def browser(playwright: Playwright) -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium on this machine")
    expect.set_options(timeout=GENEROUS)
    browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
    yield browser
    browser.close()


@dataclass
class Window:
    """A browser window on the console, with what went wrong in it."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    """Answers of 400 and above, by path: what the browser's own log says about them is no fault of the page."""
    away: bool = False
    """The server is away for now, so that calls fail."""

    def open(self, where: str = "") -> Page:
        self.page.goto(f"{self.url}/{where}")
        return self.page

    def check(self) -> None:
        """Nothing went wrong so far."""
        if not self.page.is_closed():
            self.faults += self.page.evaluate("window.violations ?? []")
            assert not self.page.evaluate("window.pwned ?? false"), "a text was run"
        assert not self.faults, self.faults


@pytest.fixture
def window(browser: Browser) -> Iterator[Callable[..., Window]]:
    """`window(running, **context)`: a new window, of a new visitor; everything that it asks for is looked at."""
    opened: list[tuple[Window, BrowserContext]] = []

    def make(running: RunningServer, **context: Any) -> Window:
        chosen: dict[str, Any] = {"viewport": WIDE, "color_scheme": "light", "permissions": []}
        visitor = browser.new_context(**{**chosen, **context})
        visitor.add_init_script(WATCH)
        visitor.set_default_timeout(GENEROUS)
        page = visitor.new_page()
        made = Window(page, running.url)
        opened.append((made, visitor))
        _watch(made, visitor)
        return made

    yield make
    try:
        for each, _ in opened:
            each.check()
    finally:
        for _, visitor in opened:
            visitor.close()


def _watch(window: Window, visitor: BrowserContext) -> None:
    here = urlsplit(window.url).netloc

    def foreign(route: Route, request: Request) -> None:
        window.faults.append(f"asked another host: {request.url}")
        route.abort()

    visitor.route(
        lambda url: urlsplit(url).netloc not in (here, "") and not url.startswith(("blob:", "data:")), foreign
    )
    page = window.page
    page.on("pageerror", lambda error: window.faults.append(f"error: {error}"))
    page.on(
        "response",
        lambda reply: window.refused.append((reply.status, urlsplit(reply.url).path)) if reply.status >= 400 else None,
    )

    def said(message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        if message.text.startswith("Failed to load resource") and ("status of" in message.text or window.away):
            return
        window.faults.append(f"{message.type}: {message.text}")

    page.on("console", said)


@pytest.fixture
def no_sideways() -> Callable[[Page], None]:
    """`no_sideways(page)`: the page is not wider than its window."""

    def check(page: Page) -> None:
        width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0, f"{width} px too wide"

    return check


@pytest.fixture(scope="package")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of reports, with one that `neuronlens evaluate` made."""
    folder = tmp_path_factory.mktemp("reports")
    model = save_tiny("bert", folder / "model")
    data = write_jsonl(folder / "texts.jsonl", labelled_texts(60, seed=1))
    out = folder / "reports" / "tiny & <b>small"
    options = ["--data", data, "--test-data", data, "--out", out, "--target", "Sports", "--device", "cpu"]
    assert run(list(map(str, ["evaluate", "--model", model, *options]))) == 0
    return out.parent


@contextmanager
def held(page: Page, pattern: str) -> Iterator[None]:
    """No such request of the page is answered in here; all of them are when it is left."""
    waiting: list[Route] = []
    page.route(pattern, lambda route: waiting.append(route))
    yield
    for route in waiting:
        route.continue_()
    page.unroute(pattern)


def tab_to(page: Page, target: Locator, most: int = 80) -> None:
    """Press Tab until the target has the focus."""
    expect(target).to_be_visible()
    for _ in range(most):
        page.keyboard.press("Tab")
        if target.evaluate("(element) => element === document.activeElement"):
            return
    raise AssertionError(f"Tab does not lead to {target}")
