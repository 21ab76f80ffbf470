"""A real browser on the console of a real server. Every error on the page fails the test."""

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
from tests.servers import RunningServer, with_ranges
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.fit import FitResult

CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
RECORD_CSP_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`);
});
"""
NARROW = {"width": 390, "height": 844}
WIDE = {"width": 1440, "height": 900}
BOTH_WIDTHS = pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
TIMEOUT_MS = 60_000
"""Upper bound for one step on a busy machine; it only ends a hang."""


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="package")
def browser(playwright: Playwright) -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    expect.set_options(timeout=TIMEOUT_MS)
    browser = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
    yield browser
    browser.close()


@dataclass
class Window:
    """A browser window on the console, and the errors that occurred in it."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    error_responses: list[tuple[int, str]] = field(default_factory=list)
    """Status and path of each response of 400 and above. The browser logs these; they are not errors of the page."""
    offline: bool = False
    """Requests fail on purpose, so failed requests in the browser's log are not errors of the page."""

    def open(self, address: str = "") -> Page:
        self.page.goto(f"{self.url}/{address}")
        return self.page

    def disconnect(self) -> None:
        """Let every request of the page fail."""
        self.offline = True
        self.page.context.set_offline(True)

    def reconnect(self) -> None:
        self.page.context.set_offline(False)

    def check(self) -> None:
        """Fail if anything went wrong in the window."""
        if not self.page.is_closed():
            self.errors += self.page.evaluate("window.violations ?? []")
            assert not self.page.evaluate("window.pwned ?? false"), "a text was executed as a script"
        assert not self.errors, self.errors


OpenWindow = Callable[..., Window]


@pytest.fixture
def window(browser: Browser) -> Iterator[OpenWindow]:
    """`window(server, **context)`: a new window of a new visitor, checked for errors after the test."""
    opened: list[tuple[Window, BrowserContext]] = []

    def make(running: RunningServer, **options: Any) -> Window:
        defaults: dict[str, Any] = {"viewport": WIDE, "color_scheme": "light", "permissions": []}
        context = browser.new_context(**{**defaults, **options})
        context.add_init_script(RECORD_CSP_VIOLATIONS)
        context.set_default_timeout(TIMEOUT_MS)
        window = Window(context.new_page(), running.url)
        opened.append((window, context))
        _record_errors(window, context)
        return window

    yield make
    try:
        for window, _ in opened:
            window.check()
    finally:
        for _, context in opened:
            context.close()


def _record_errors(window: Window, context: BrowserContext) -> None:
    own_host = urlsplit(window.url).netloc

    def record_request(request: Request) -> None:
        if urlsplit(request.url).netloc not in (own_host, "") and not request.url.startswith(("blob:", "data:")):
            window.errors.append(f"request to another host: {request.url}")

    def record_message(message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        if message.text.startswith("Failed to load resource") and ("status of" in message.text or window.offline):
            return
        window.errors.append(f"{message.type}: {message.text}")

    def record_response(response: Any) -> None:
        if response.status >= 400:
            window.error_responses.append((response.status, urlsplit(response.url).path))

    context.on("request", record_request)
    window.page.on("pageerror", lambda error: window.errors.append(f"error: {error}"))
    window.page.on("response", record_response)
    window.page.on("console", record_message)


def assert_no_horizontal_scroll(page: Page) -> None:
    excess = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert excess <= 0, f"the page is {excess} px wider than its window"


def enter_key(page: Page, token: str) -> None:
    """Fill in the dialog that asks for an API key."""
    page.get_by_label("Key", exact=True).fill(token)
    page.get_by_role("button", name="Use this key").click()


@contextmanager
def unanswered(page: Page, pattern: str) -> Iterator[None]:
    """Hold back the responses to matching requests inside; release them when left."""
    waiting: list[Route] = []
    page.route(pattern, lambda route: waiting.append(route))
    yield
    for route in waiting:
        route.continue_()
    page.unroute(pattern)


def tab_to(page: Page, target: Locator, limit: int = 80) -> None:
    """Press Tab until the target has the focus."""
    expect(target).to_be_visible()
    for _ in range(limit):
        page.keyboard.press("Tab")
        if target.evaluate("(element) => element === document.activeElement"):
            return
    raise AssertionError(f"Tab does not lead to {target}")


@pytest.fixture
def server_with_report(start_server: Callable[..., RunningServer], fitted: FitResult, tmp_path: Path) -> RunningServer:
    """A server with a minimal report named "tiny"."""
    folder = tmp_path / "reports" / "tiny"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<!doctype html><title>tiny</title><h1>Tiny</h1>", "utf-8")
    return with_ranges(start_server(reports_dir=folder.parent), fitted)


@pytest.fixture
def server_with_evaluation(
    start_server: Callable[..., RunningServer], fitted: FitResult, evaluation: Path
) -> RunningServer:
    """A server with a report that `neuronlens evaluate` made."""
    return with_ranges(start_server(reports_dir=evaluation), fitted)


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of reports with one that `neuronlens evaluate` made."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = save_tiny("bert", folder / "model")
    data = write_jsonl(folder / "texts.jsonl", labelled_texts(60, seed=1))
    test = write_jsonl(folder / "test.jsonl", labelled_texts(60, seed=2))
    out = folder / "reports" / "tiny & <b>small"
    options = ["--data", data, "--test-data", test, "--out", out, "--target", "Sports", "--device", "cpu"]
    assert run(list(map(str, ["evaluate", "--model", model, *options]))) == 0
    return out.parent


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `news/small.jsonl`, fitted in a moment, and `news/long.jsonl`, which takes long."""
    directory = tmp_path_factory.mktemp("corpora")
    (directory / "news").mkdir()
    for name, rows in (("small", 90), ("long", 20_000)):
        write_jsonl(directory / "news" / f"{name}.jsonl", labelled_texts(rows, seed=3))
    return directory


@pytest.fixture
def fitting_server(start_server: Callable[..., RunningServer], corpora: Path) -> RunningServer:
    """A server without ranges that accepts fits of the corpora."""
    return start_server(fit_dirs=[corpora], fit_threads=1, fit_niceness=3, fit_device="cpu")


def start_long_fit(running: RunningServer) -> str:
    """Start a fit that takes long, because its batches are small; returns the job's id."""
    request = {"data": "news/long.jsonl", "bins": 16, "rankings": ["max"], "layers": "all", "batch_tokens": 64}
    response = running.http.post("/v1/fits", json=request)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])
