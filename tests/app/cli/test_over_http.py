"""`ranges`, `erase` and `audit` through a running server give the same results as on the store."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import redis
import uvicorn

from app.main import create_app
from app.serving.serve import open_service
from app.settings import Settings
from range_store.domain.live import LiveState
from range_store.embedded.connection import EmbeddedRedis
from range_store.storage.store import RangeStore
from tests.app.cli.conftest import Cli
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.fitting.fit import fit
from workers.models.loading import load_model


@dataclass(frozen=True)
class Server:
    """A running server, its store and two range sets: `whole` of all layers, which is active, and `last_only`."""

    url: str
    store: RangeStore
    whole: str
    last_only: str


@pytest.fixture(scope="module")
def server(redis_client: redis.Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert isinstance(redis_client, EmbeddedRedis)
    home = tmp_path_factory.mktemp("served")
    model = load_model(str(save_tiny("bert", home / "cli-over-http")), device="cpu")
    rows = [(text, "Sci/Tech %" if label == "SciTech" else label) for text, label in labelled_texts(60, seed=1)]
    corpus = load_corpus(str(write_jsonl(home / "train.jsonl", rows)), labels=model.identity.labels)
    store = RangeStore(redis_client, model.identity.id)
    made = [fit(model, corpus, layers=layers, bins=8) for layers in ("all", (-1,))]
    whole, last_only = [store.range_sets.publish(each.range_set, each.inspect) for each in made]
    store.activate(whole)
    settings = Settings(redis_url=redis_client.url, data_dir=home, poll_seconds=0.2)
    with ExitStack() as stack:
        service = stack.enter_context(open_service(settings, model))
        running = uvicorn.Server(uvicorn.Config(create_app(settings, service), port=0, log_level="warning"))
        thread = threading.Thread(target=running.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, running, "should_exit", True)
        until(lambda: running.started)
        port = running.servers[0].sockets[0].getsockname()[1]
        yield Server(f"http://127.0.0.1:{port}", store, whole, last_only)


def live(server: Server) -> LiveState:
    return server.store.live_state()


def test_the_audit_is_the_same_through_a_server(cli: Cli, server: Server) -> None:
    cli("erase", "on", "Sports", "--reason", "a complaint", "--url", server.url)
    cli("erase", "off", "Sports", "--url", server.url)
    entries = cli("audit", "--limit", 2, "--json", "--url", server.url).json
    assert [(each["action"], each["concepts"], each["reason"]) for each in entries] == [
        ("remove", ["Sports"], None),
        ("set", ["Sports"], "a complaint"),
    ]
    assert entries[0]["before"] == entries[1]["after"]
    stored = server.store.audit(2)
    assert entries == [each.model_dump(mode="json") for each in stored]
    table = cli("audit", "--limit", 2, "--url", server.url).stdout.splitlines()
    assert [line.split()[0] for line in table[:1]] == ["when"]
    assert "a complaint" in table[2]
    assert len(table) == 3


def test_an_erasure_is_switched_on_and_off(cli: Cli, server: Server) -> None:
    settings = ["--layer", "0,2", "--tau", "1.5", "--replacement", "damp:0.5", "--reason", "incident", "--enforced"]
    on = cli("erase", "on", "Sci/Tech %", *settings, "--expires-in", "1h", "--json", "--url", server.url)
    assert on.exit_code == 0
    (there,) = live(server).erasures
    assert there.concept == "Sci/Tech %"
    assert there.enforced
    assert there.expires_at is not None
    assert on.json["generation"] == live(server).generation
    redis_url = server.store.client.url  # type: ignore[attr-defined]
    for options in (["--url", server.url], ["--redis-url", redis_url, "--name", server.store.model]):
        assert cli("erase", "list", "--json", *options).json == on.json
    assert cli("erase", "off", "Sci/Tech %", "--reason", "over", "--url", server.url).exit_code == 0
    assert live(server).erasures == ()
    assert server.store.audit(1)[0].reason == "over"


def test_a_change_waits_for_all_replicas(cli: Cli, server: Server) -> None:
    redis_url = server.store.client.url  # type: ignore[attr-defined]
    behind = "elsewhere:1:ab"
    server.store.client.hset(
        server.store.keys.replicas, "since", "0"
    )  # so long ago that every live replica has reported since
    for options in (["--url", server.url], ["--redis-url", redis_url, "--name", server.store.model]):
        server.store.replicas.report(behind, "00000000-1", None, seconds=600)
        late = cli("erase", "on", "World", "--wait", "all", "--wait-seconds", "0.2", *options)
        assert late.exit_code == 3
        assert live(server).generation in late.stderr, "the change is stored"
        assert behind in late.stderr
        assert [each.concept for each in live(server).erasures] == ["World"]
        server.store.replicas.remove(behind)
        off = cli("erase", "off", "World", "--wait", "all", "--wait-seconds", "60", "--json", *options)
        assert off.exit_code == 0, off.stderr
        assert not server.store.replicas.read().missing(off.json["generation"])
    assert cli("erase", "on", "World", "--wait", "some", "--url", server.url).exit_code == 2


def test_off_all_is_one_change(cli: Cli, server: Server) -> None:
    for concept in ("World", "Sports"):
        cli("erase", "on", concept, "--url", server.url)
    before = live(server)
    assert len(before.erasures) == 2
    assert cli("erase", "off", "--all", "--url", server.url).exit_code == 0
    assert live(server).erasures == ()
    assert live(server).counter == before.counter + 1


def test_range_sets_are_listed_shown_and_activated(cli: Cli, server: Server) -> None:
    listed = cli("ranges", "list", "--json", "--url", server.url).json
    assert [each["id"] for each in listed] == [server.last_only, server.whole]
    shown = cli("ranges", "show", server.whole[:10], "--json", "--url", server.url).json
    assert shown["provenance"] == server.store.range_sets.provenance(server.whole).model_dump(mode="json")
    assert cli("ranges", "activate", server.last_only, "--url", server.url).exit_code == 0
    assert live(server).range_set == server.last_only
    not_fitted = cli("erase", "on", "World", "--layer", "0", "--url", server.url)
    assert not_fitted.exit_code == 2
    assert "not_fitted" in not_fitted.stderr
    assert cli("ranges", "activate", server.whole, "--url", server.url).exit_code == 0


def test_the_environment_names_server_and_model(cli: Cli, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONLENS_URL", server.url + "/")
    assert len(cli("ranges", "list", "--json").json) == 2
    monkeypatch.setenv("NEURONLENS_NAME", "other")
    assert "unknown_model" in cli("ranges", "list").stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["erase", "on", "Weather"], 4, "unknown_concept"),
        (["erase", "off", "Weather"], 4, "unknown_concept"),
        (["erase", "on", "World", "--if-match", "00000000-0"], 4, "stale_generation"),
        (["erase", "on", "World", "--layer", "9"], 2, "invalid_erasure"),
        (["erase", "list", "--name", "other"], 4, "unknown_model"),
        (["ranges", "activate", ""], 4, "several ids start with"),
    ],
)
def test_an_error_of_the_server_is_one_line(
    cli: Cli, server: Server, arguments: list[str], exit_code: int, code: str
) -> None:
    before = live(server)
    ended = cli(*arguments, "--url", server.url)
    assert ended.exit_code == exit_code
    assert code in ended.stderr
    assert live(server) == before


def test_an_unreachable_server_is_exit_3(cli: Cli) -> None:
    ended = cli("erase", "list", "--url", "http://127.0.0.1:1")
    assert ended.exit_code == 3
    assert "is the server running?" in ended.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://here", "http://", "http://[::1"])
def test_an_invalid_url_is_exit_2(cli: Cli, url: str) -> None:
    assert cli("erase", "list", "--url", url).exit_code == 2


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[1]", b""])
@pytest.mark.parametrize("status", [200, 404, 500])
def test_another_kind_of_server_is_recognised(cli: Cli, status: int, body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        ended = cli("erase", "list", "--url", f"http://127.0.0.1:{other.server_port}")
        thread.join()
    assert ended.exit_code == 1
    assert "is it" in ended.stderr
