"""The private Redis: processes share it, the last one ends it, and a directory never has two."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from range_store.embedded import server as embedded_server
from range_store.embedded.connection import EmbeddedRedis, connect
from range_store.embedded.server import EmbeddedServer
from range_store.errors import StoreUnavailable
from range_store.redis_errors import translate_redis_errors
from tests.range_store.waiting import until

CLIENT_PROGRAM = """
import sys
from pathlib import Path
from range_store.embedded.connection import connect
with connect(None, Path(sys.argv[1])) as client:
    print(client.incr("processes"), client.info("server")["process_id"], flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_process(directory: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A process that uses the server of `directory`, its count of processes so far, and the server's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT_PROGRAM, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        count, pid = process.stdout.readline().split()
        yield process, int(count), int(pid)
    finally:
        leave(process)


def leave(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.communicate("\n")


def server_pid(client: redis.Redis) -> int:
    return int(client.info("server")["process_id"])


def running(directory: Path) -> bool:
    return EmbeddedServer(directory).running()


def test_data_survives_the_end_of_the_server(tmp_path: Path) -> None:
    with connect(None, tmp_path / "new" / "redis") as client:
        client.set("kept", "1")
        assert running(tmp_path / "new" / "redis")
    assert not running(tmp_path / "new" / "redis")
    with connect(None, tmp_path / "new" / "redis") as client:
        assert client.get("kept") == b"1"


def test_only_its_user_can_connect(tmp_path: Path) -> None:
    directory = tmp_path / "redis"
    with EmbeddedRedis.open(directory) as client:
        assert client.config_get("port") == {"port": "0"}
        socket = EmbeddedServer(directory).socket
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "appendonly.aof").stat().st_mode) == 0o600


def test_acknowledged_write_survives_a_kill(tmp_path: Path) -> None:
    with connect(None, tmp_path) as client:
        client.set("kept", "1")
        os.kill(server_pid(client), signal.SIGKILL)
        until(lambda: not running(tmp_path))
        assert client.get("kept") == b"1"


def test_two_processes_share_one_server_and_the_last_ends_it(tmp_path: Path) -> None:
    with connect(None, tmp_path) as client:
        assert client.incr("processes") == 1
        with another_process(tmp_path) as (_, count, pid):
            assert (count, pid) == (2, server_pid(client))
        assert server_pid(client) == pid, "the first process still uses it"
    assert not running(tmp_path)


def test_server_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, _, pid):
        with connect(None, tmp_path) as client:
            leave(process)
            assert server_pid(client) == pid
        assert not running(tmp_path)


def test_server_of_a_killed_process_is_used_by_the_next(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, _, pid):
        process.kill()
        process.wait()
    assert running(tmp_path)
    with connect(None, tmp_path) as client:
        assert server_pid(client) == pid
    assert not running(tmp_path)


def test_killed_server_is_started_again_by_the_next_command(tmp_path: Path) -> None:
    with connect(None, tmp_path) as client:
        for _ in range(3):
            pid = server_pid(client)
            os.kill(pid, signal.SIGKILL)
            until(lambda: not running(tmp_path))
            assert server_pid(client) != pid
    assert not running(tmp_path)


def test_closed_client_starts_no_server(tmp_path: Path) -> None:
    client = connect(None, tmp_path)
    client.close()
    client.close()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    assert not running(tmp_path)


def test_stale_files_of_a_killed_server_do_not_prevent_a_start(tmp_path: Path) -> None:
    client = connect(None, tmp_path)
    os.kill(server_pid(client), signal.SIGKILL)
    until(lambda: not running(tmp_path))
    assert (tmp_path / "redis.pid").exists()
    assert EmbeddedServer(tmp_path).socket.exists()
    (tmp_path / "redis.pid").write_text(str(os.getpid()))
    with connect(None, tmp_path) as second:
        assert second.ping()


def test_server_whose_socket_was_removed_is_replaced(tmp_path: Path) -> None:
    with connect(None, tmp_path) as client:
        client.set("kept", "1")
        pid = server_pid(client)
        EmbeddedServer(tmp_path).socket.unlink()
        with connect(None, tmp_path) as second:
            assert second.get("kept") == b"1"
            assert server_pid(second) != pid
            assert client.get("kept") == b"1", "the older client uses the new server"


def test_concurrent_connects_start_one_server(tmp_path: Path) -> None:
    clients: list[redis.Redis] = []
    threads = [threading.Thread(target=lambda: clients.append(connect(None, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({server_pid(client) for client in clients}) == 1
    threads = [threading.Thread(target=client.close) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not running(tmp_path)


def test_connection_by_url_keeps_the_server_up(tmp_path: Path) -> None:
    client = EmbeddedRedis.open(tmp_path)
    by_url = connect(client.url, tmp_path / "unused")
    assert by_url.ping()
    client.close()
    assert by_url.ping()
    assert not (tmp_path / "unused").exists()
    by_url.close()
    connect(None, tmp_path).close()
    assert not running(tmp_path)


@pytest.mark.parametrize("name", ["with space 'and \"quotes", "größe", "--port 6379"])
def test_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    with EmbeddedRedis.open(tmp_path / name) as client:
        client.set("kept", name)
        with connect(client.url, tmp_path) as by_url:
            assert by_url.get("kept") == name.encode()


def test_directory_with_a_long_path_gets_a_short_socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / ("d" * 120)
    with connect(None, directory) as client:
        socket = EmbeddedServer(directory).socket
        assert len(os.fsencode(socket)) <= embedded_server.SOCKET_PATH_LIMIT
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with connect(None, directory) as second:
            assert server_pid(second) == server_pid(client), "found although a new server would use another path"
    assert not socket.exists()


def test_short_socket_directory_that_others_can_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "t"
    monkeypatch.setattr("tempfile.tempdir", str(home))
    monkeypatch.setattr(embedded_server, "SOCKET_PATH_LIMIT", len(os.fsencode(home)) + 45)
    (home / f"neuronlens-{os.getuid()}").mkdir(parents=True)
    (home / f"neuronlens-{os.getuid()}").chmod(0o755)
    with pytest.raises(StoreUnavailable, match="0700"):
        connect(None, tmp_path / ("d" * 120))


def test_unusable_directory_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "redis"):
        with pytest.raises(StoreUnavailable, match=r"cannot keep a private Redis in .*file"):
            connect(None, directory)


def test_error_says_why_the_server_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"not what Redis writes")
    with pytest.raises(StoreUnavailable, match=r"did not start: Bad file format"):
        connect(None, tmp_path)
    (tmp_path / "appendonly.aof").unlink()
    monkeypatch.setattr(embedded_server, "_executable", lambda: str(tmp_path / "absent"))
    with pytest.raises(StoreUnavailable, match=r"cannot be started: .*absent"):
        connect(None, tmp_path)
    monkeypatch.setattr(embedded_server, "_executable", lambda: "/bin/false")
    with pytest.raises(StoreUnavailable, match=r"did not start: exit status 1"):
        connect(None, tmp_path)
    monkeypatch.undo()
    with connect(None, tmp_path) as client:
        assert client.ping()


def test_invalid_url_is_refused_without_its_password() -> None:
    # pragma: allowlist nextline secret
    for url in ("http://ann:secret@host", "secret", "redis://ann:secret@host:port/0", "redis://ann:secret@host?db=x"):
        with pytest.raises(StoreUnavailable, match=r"redis://") as caught:
            connect(url, Path("unused"))
        assert "secret" not in str(caught.value)


def test_unreachable_redis_is_an_error_only_when_used() -> None:
    client = connect("redis://:secret@127.0.0.1:1/0", Path("unused"))
    with pytest.raises(StoreUnavailable, match="cannot be reached") as caught, translate_redis_errors():
        client.ping()
    assert "secret" not in str(caught.value)


def test_each_refusal_of_redis_has_its_own_message(tmp_path: Path) -> None:
    with EmbeddedRedis.open(tmp_path) as client:
        messages = {}

        def refused(name: str, by: redis.Redis = client) -> None:
            with pytest.raises(StoreUnavailable) as caught, translate_redis_errors():
                by.set("key", "value")
            messages[name] = str(caught.value)

        client.config_set("maxmemory", "1")
        refused("OOM")
        client.config_set("maxmemory", "0")
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        refused("READONLY")
        client.execute_command("REPLICAOF", "NO", "ONE")
        client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+get", "+ping")
        client.execute_command("ACL", "SETUSER", "default", "resetpass", ">secret")
        with connect(client.url, tmp_path) as anonymous:
            refused("NOAUTH", anonymous)
        with connect(f"{client.url}?username=reader&password=wrong", tmp_path) as wrong:
            refused("WRONGPASS", wrong)
        with connect(f"{client.url}?username=reader&password=secret", tmp_path) as reader:
            refused("NOPERM", reader)
        client.execute_command("ACL", "SETUSER", "default", "nopass")
    for name, sentence in (
        ("OOM", "out of memory"),
        ("READONLY", "read-only replica"),
        ("NOAUTH", "requires a password"),
        ("WRONGPASS", "refuses the user name or password"),
        ("NOPERM", "ACL"),
    ):
        assert sentence in messages[name], name
