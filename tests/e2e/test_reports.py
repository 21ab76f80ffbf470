"""`/v1/reports` over HTTP: reports are listed and downloaded, and no other file is."""

import asyncio
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from starlette.types import Message

from app.routes.reports import PIECE, FileStream
from app.serving.reports import open_file
from tests.e2e.reports import PAGE, write_report
from tests.servers import RunningServer

Problem = Callable[[httpx.Response, int, str], dict[str, Any]]
NAMES = ["plain", "with space & 'quotes'", "Météo–日本", "100%", "a.b", "x" * 200, "semi;colon?query#hash"]


@pytest.fixture
def reports(server: RunningServer) -> Iterator[Path]:
    """The directory of reports of the shared server; it does not exist before and after the test."""
    directory = server.service.settings.data_dir / "reports"
    assert not directory.exists()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def listed(server: RunningServer) -> list[dict[str, Any]]:
    answer = server.http.get("/v1/reports")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["reports"]
    return found


def get(server: RunningServer, *segments: str) -> httpx.Response:
    return server.http.get("/v1/reports/" + "/".join(quote(each, safe="") for each in segments))


def test_reports_are_listed_newest_first_with_their_run(server: RunningServer, reports: Path) -> None:
    assert listed(server) == []
    for age, name in enumerate(NAMES):
        directory = write_report(reports, name)
        for file in directory.iterdir():
            os.utime(file, (1_700_000_000 - age, 1_700_000_000 - age))
    found = listed(server)
    assert [each["id"] for each in found] == NAMES
    first = found[0]
    assert (first["state"], first["created_at"], first["model"]) == ("complete", 1_700_000_000, "tiny-news")
    assert (first["data"], first["texts"], first["targets"]) == ("test.jsonl", 7, ["World", "Sci/Tech"])
    for each in found:
        assert get(server, each["id"]).json() == each
        for file in each["files"]:
            assert get(server, each["id"], file).status_code == 200, each["id"]


def test_files_have_their_media_type_and_pages_are_sandboxed(server: RunningServer, reports: Path) -> None:
    write_report(reports, "plain")
    page = get(server, "plain", "report.html")
    assert page.text == PAGE
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none';")
    assert "allow-same-origin" not in policy
    assert "http" not in policy
    kinds = {"report.html": "text/html", "results.csv": "text/csv", "run.json": "application/json"}
    for file, kind in kinds.items():
        answer = get(server, "plain", file)
        assert answer.headers["Content-Type"].partition(";")[0] == kind
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.content == (reports / "plain" / file).read_bytes()


@pytest.mark.parametrize(
    "run",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"model": 3}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": {"id": "\\ud800"}}',
        b'{"model": {"id": "m"}, "test": {"name": "t", "rows": "many"}, "settings": {"targets": [], "methods": []}}',
        b'{"model": {"id": "m"}, "test": {"name": "t", "rows": 1e999}, "settings": {"targets": [], "methods": []}}',
    ],
)
def test_report_with_an_unreadable_run_is_listed_as_broken(server: RunningServer, reports: Path, run: bytes) -> None:
    (write_report(reports, "broken") / "run.json").write_bytes(run)
    write_report(reports, "whole")
    states = {each["id"]: (each["state"], each["model"]) for each in listed(server)}
    assert states == {"broken": ("broken", None), "whole": ("complete", "tiny-news")}
    assert get(server, "broken", "report.html").status_code == 200


def test_unfinished_reports_are_incomplete_and_other_entries_are_not_listed(
    server: RunningServer, reports: Path, problem: Problem
) -> None:
    (write_report(reports, "half") / "report.html").unlink()
    (reports / "started").mkdir()
    (reports / "started" / ".checkpoint").write_text("x")
    (reports / "a file").write_text("x")
    write_report(reports, ".hidden")
    assert {each["id"]: (each["state"], each["files"]) for each in listed(server)} == {
        "half": ("incomplete", ["results.csv", "run.json"]),
        "started": ("incomplete", []),
    }
    for name, file in (("half", "report.html"), ("started", "run.json"), (".hidden", "run.json"), ("none", "run.json")):
        problem(get(server, name, file), 404, "unknown_report")
    for name in ("a file", ".hidden", "none", "x" * 3000, "nul\0"):
        problem(get(server, name), 404, "unknown_report")


def test_links_and_special_files_are_not_followed(
    server: RunningServer, reports: Path, tmp_path: Path, problem: Problem
) -> None:
    outside = write_report(tmp_path / "elsewhere", "secret")
    inside = write_report(reports, "linked")
    (reports / "link").symlink_to(outside)
    for file in ("report.html", "results.csv", "run.json"):
        (inside / file).unlink()
    (inside / "report.html").symlink_to(outside / "report.html")
    os.mkfifo(inside / "results.csv")
    (inside / "run.json").mkdir()
    assert [(each["id"], each["state"], each["files"]) for each in listed(server)] == [("linked", "incomplete", [])]
    for file in ("report.html", "results.csv", "run.json"):
        problem(get(server, "linked", file), 404, "unknown_report")
        problem(get(server, "link", file), 404, "unknown_report")


def test_no_path_leads_out_of_the_directory(server: RunningServer, reports: Path) -> None:
    parent = reports.parent
    secret = write_report(parent, "secret")
    (parent / "run.json").write_text('{"secret": true}')
    write_report(reports, "plain")
    url = httpx.URL(server.url)
    paths = [
        *("..", "../secret", "%2e%2e", "%2e%2e/run.json", "..%2frun.json", "..%2fsecret/run.json"),
        *("%2e%2e%2fsecret/run.json", "..%5csecret/run.json", "plain/..%2f..%2frun.json"),
        *("plain/../../run.json", "plain/%2e%2e/run.json", "./run.json", "%2e/run.json"),
        *("plain%2f..%2f..%2fsecret/run.json", "%00/run.json", "plain/run.json%00.csv", "//run.json"),
        *(f"{str(parent).replace('/', '%2f')}%2fsecret/run.json", "plain/results.json", "plain/"),
        *("plain//run.json", "%c0%ae%c0%ae/run.json", "%ff/run.json", "plain/RUN.JSON"),
    ]
    for path in paths:
        with socket.create_connection((url.host, url.port or 80), timeout=60) as connection:
            connection.sendall(
                f"GET /v1/reports/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
            )
            reply = b""
            while received := connection.recv(65536):
                reply += received
        assert reply.split(b" ", 2)[1] in (b"400", b"404", b"422"), (path, reply)
        assert b"tiny-news" not in reply, path
        assert b'secret": true' not in reply, path
    (parent / "run.json").unlink()
    shutil.rmtree(secret)


def test_reports_dir_is_a_setting(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    write_report(tmp_path / "mine", "plain")
    assert [each["id"] for each in listed(start_server(reports_dir=tmp_path / "mine"))] == ["plain"]


@pytest.mark.parametrize("gone", [False, True], ids=["read", "gone"])
def test_a_file_is_sent_in_pieces_and_closed(tmp_path: Path, gone: bool) -> None:
    """However large it is, a piece of it is in memory; also where its client goes, or it grows meanwhile."""
    written = os.urandom(2 * PIECE + 1)
    file = write_report(tmp_path, "large") / "report.html"
    file.write_bytes(written)
    sent: list[Message] = []

    async def receive() -> Message:
        if not gone:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    stream = open_file(tmp_path, "large", "report.html")
    reply = FileStream(stream, {}, "text/html")
    with file.open("ab") as growing:
        growing.write(b"more")
    asyncio.run(reply({"type": "http", "asgi": {}}, receive, send))
    assert stream.closed
    pieces = [message.get("body", b"") for message in sent[1:]]
    assert max(map(len, pieces), default=0) <= PIECE
    if not gone:
        assert (b"content-length", b"%d" % len(written)) in sent[0]["headers"]
        assert b"".join(pieces) == written


def test_a_large_page_arrives_packed_or_plain(server: RunningServer, reports: Path) -> None:
    page = "<!doctype html>" + "<p>a line of a report" * 50_000
    (write_report(reports, "large") / "report.html").write_text(page)
    packed = get(server, "large", "report.html")
    assert (packed.text, packed.headers["content-encoding"]) == (page, "gzip")
    plain = server.http.get("/v1/reports/large/report.html", headers={"Accept-Encoding": "identity"})
    assert (plain.text, plain.headers["content-length"]) == (page, str(len(page)))
    head = server.http.head("/v1/reports/large/report.html", headers={"Accept-Encoding": "identity"})
    assert head.headers["content-length"] == plain.headers["content-length"]
