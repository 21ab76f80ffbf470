"""A server takes as many connections as it may open files for."""

import resource

import pytest

from app.http.server import OTHER_FILES, _within_open_files
from app.settings import Settings


@pytest.mark.parametrize(("files", "connections"), [(65536, 1000), (1000 + OTHER_FILES, 1000), (1024, 896), (64, 1)])
def test_connections_leave_room_for_other_open_files(
    files: int, connections: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert _within_open_files(Settings()).max_connections == connections
    assert ("ulimit -n" in caplog.text) == (connections < 1000)
