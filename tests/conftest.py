"""Options, tiers and fixtures of all tests."""

import os
import signal
from collections.abc import Generator, Iterator

import pytest
import redis
from hypothesis import settings

from range_store.embedded.connection import connect

pytest_plugins = ["tests.servers", "tests.e2e.on_ray"]

# no limit on the time of an example: pytest-timeout ends what hangs
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# Ray gives its workers priority 15: beside processes that keep the cores busy they would hardly run
os.environ.setdefault("RAY_worker_niceness", "0")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: commands under test would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

TIERS = {"system", "full"}
DATA_ABSENT = "no public data sets: $DATA is not a directory"
NEEDS_THIS_PROCESS = {"own_redis", "server_with_keys", "keyed_server"}
"""Fixtures whose tests a fleet cannot share: each test would need a fleet of its own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="fail if a test is skipped (CI)")
    parser.addoption("--fleet", action="store_true", help="run the engines of the servers on Ray")
    parser.addoption("--seed", type=int, default=5, help="seed of randomized tests")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test with the markers of two tiers is an error of its file."""
    report = yield
    for item in report.result or ():
        if isinstance(item, pytest.Item) and {mark.name for mark in item.iter_markers()} >= TIERS:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} is marked `system` and `full`: a test belongs to one tier"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("data") and not os.path.isdir(os.environ.get("DATA", "")):
            item.add_marker(pytest.mark.skip(reason=DATA_ABSENT))
    # a process is connected to one cluster at a time, and keeps the one of tests/e2e to its end; the one long test of
    # the fast tier begins first, so that no worker is left with it at the end
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/workers/cluster/", "tests/e2e/test_ray_smoke.py")))
    if config.getoption("--fleet"):
        local = {
            item
            for item in items
            if item.get_closest_marker("local") or NEEDS_THIS_PROCESS & set(getattr(item, "fixturenames", ()))
        }
        config.hook.pytest_deselected(items=list(local))
        items[:] = [item for item in items if item not in local]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Say how many tests the public data sets would have run; with --fail-on-skip, fail for any other skip."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    without_data = sum(DATA_ABSENT in str(report.longrepr) for report in skipped)
    if without_data:
        reporter.write_line(f"\n{without_data} skipped: {DATA_ABSENT}")
    others = len(skipped) - without_data
    if others and session.config.getoption("--fail-on-skip"):
        reporter.write_line(f"\n{others} skipped: with --fail-on-skip that is a failure")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A client of one embedded Redis per test process; each test uses model names of its own."""
    with connect(None, tmp_path_factory.mktemp("redis")) as client:
        client.config_set("appendfsync", "no")  # no test of it loses power; a busy disk would delay answers
        yield client
