"""Options and fixtures for all tests: a real Redis, embedded, for whoever touches the store."""

import signal
from collections.abc import Iterator

import pytest
import redis
from hypothesis import settings

from range_store.embedded import connect

pytest_plugins = ["tests.servers", "tests.e2e.on_ray"]

# a busy machine is no fault of the code: pytest-timeout ends what hangs
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: commands under test would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="a skipped test is a failure (CI)")
    parser.addoption("--fleet", action="store_true", help="servers of tests/e2e have their engines on Ray")
    parser.addoption("--seed", type=int, default=5, help="of what is tried at random: another one tries other things")


OF_THIS_PROCESS = {"own_redis", "server_with_keys"}
"""Fixtures whose tests are about what an ingress shares with a single process; each would need a fleet of its own."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that end their own Ray cluster come before those that stay connected to one until the end.

    With --fleet: without the tests that look into an engine of their own process.
    """
    items.sort(key=lambda item: "tests/workers/cluster/" not in item.nodeid)
    if not config.getoption("--fleet"):
        return
    local = {
        item
        for item in items
        if item.get_closest_marker("local") or OF_THIS_PROCESS & set(getattr(item, "fixturenames", ()))
    }
    config.hook.pytest_deselected(items=list(local))
    items[:] = [item for item in items if item not in local]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not session.config.getoption("--fail-on-skip"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped:
        reporter.write_line(f"{len(skipped)} skipped: with --fail-on-skip that is a failure")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def redis_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A client of one embedded server for the whole run; tests keep apart by the names of their models."""
    with connect(None, tmp_path_factory.mktemp("redis")) as client:
        client.config_set("appendfsync", "no")  # nothing here outlives a power cut; a busy disk would hold up answers
        yield client
