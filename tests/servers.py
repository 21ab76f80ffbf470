"""Servers for tests: a real service behind a real uvicorn, on a tiny fitted model; tests speak HTTP to it.

`server` is shared by all tests of a process and is reset before each of them. A test that stops it, breaks it, or
leaves more behind than a reset clears takes `fresh_server`; one that needs settings of its own calls `start_server`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import redis
import uvicorn
from prometheus_client import CollectorRegistry

from app.http.protocol import http_protocol
from app.main import create_app
from app.serving.service import Service
from app.settings import Settings
from range_store.domain.range_set import InspectLayer, ModelIdentity, RangeSet
from range_store.embedded.connection import EmbeddedRedis, connect
from range_store.storage.api_keys import ApiKeyStore
from tests.app.openapi import dialects_of
from tests.processes import end_redis
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts, write_jsonl

if TYPE_CHECKING:  # imported by the fixtures that need torch, so that other tests start without it
    from tests.e2e.on_ray import Opened
    from workers.fitting.fit import FitResult
    from workers.models.loading import LoadedModel

LABELS = ("World", "Sports", "Business", "Sci/Tech")
OTHER_LABELS = ("Cats", "Dogs", "Sports")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
Ranges = tuple[RangeSet, Mapping[int, InspectLayer]]


@dataclass
class RunningServer:
    """A running server and its parts. `service` and `model` are the first ones of a server of several models."""

    http: httpx.Client
    service: Service
    url: str
    model: LoadedModel
    services: tuple[Service, ...]
    registry: CollectorRegistry
    initial_ranges: tuple[Ranges, ...] = ()
    """Ranges that a reset activates, one for each service."""
    counters_at_reset: Samples = field(default_factory=dict)
    """Values of all counters at the last reset; `value` subtracts them."""

    def classify(self, inputs: Any, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/classify", json={"inputs": inputs, **fields})

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """Return a sample of /metrics, by default of the first model; of a counter, its increase since the reset."""
        for chosen in ({"model": self.service.name, **(labels or {})}, dict(labels or {})):
            value = self.registry.get_sample_value(name, chosen)
            if value is not None:
                return value - self.counters_at_reset.get((name, frozenset(chosen.items())), 0.0)
        return None

    def reset(self) -> None:
        """Return to the state after the start: the initial ranges active, nothing erased, counters at zero."""
        names = [service.name for service in self.services]
        until(lambda: all(self.value("neuronlens_queue_texts", {"model": name}) == 0 for name in names))
        for service, (range_set, inspect) in zip(self.services, self.initial_ranges, strict=True):
            store = service.store
            if store.live_state().range_set != range_set.id:
                store.activate(store.range_sets.publish(range_set, inspect), force=True)
            if store.live_state().erasures:
                store.set_erasures([])
            service.mirror.refresh()
        self.counters_at_reset = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for metric in self.registry.collect()
            if metric.type in ("counter", "histogram", "summary")
            for sample in metric.samples
        }
        ready = self.http.get("/readyz")
        assert ready.status_code == 200, f"a test broke the shared server; it needs `fresh_server`: {ready.text}"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    import torch

    from tests.workers.checkpoints import save_tiny
    from workers.models.loading import load_model

    torch.set_num_threads(1)
    path = save_tiny("bert", tmp_path_factory.mktemp("e2e") / "tiny-news", labels=LABELS)
    return load_model(str(path), device="cpu")


@pytest.fixture(scope="session")
def fitted(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """Ranges of `model` at its last two blocks. The concept "Météo & co" is not a label of the model."""
    from workers.corpora.loading import load_corpus
    from workers.fitting.fit import fit

    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(90, seed=4)]
    rows += [(f"it rained in {place} all day", "Météo & co") for place in ("Kyiv", "Lima", "Oslo", "Baku")]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
    return fit(model, load_corpus(str(path), labels=LABELS), layers=(-2, -1), bins=64)


@contextmanager
def starting(
    request: pytest.FixtureRequest, redis_client: redis.Redis, model: LoadedModel, data_dir: Path
) -> Iterator[Callable[..., RunningServer]]:
    """Yield `start(*models, **settings)`; leaving the context stops every server that it started."""
    from app.serving.serve import open_service

    assert isinstance(redis_client, EmbeddedRedis)
    opened: Opened = request.getfixturevalue("on_fleet") if request.config.getoption("--fleet") else open_service
    with ExitStack() as stack:

        def start(*loaded: LoadedModel, **settings: Any) -> RunningServer:
            named: dict[str, Any] = {
                "name": f"tiny-{uuid.uuid4().hex[:8]}",
                "redis_url": redis_client.url,
                "poll_seconds": 0.2,
                "data_dir": data_dir,
            }
            chosen = Settings(**{**named, **settings})
            services = []
            for n, each in enumerate(loaded or (model,)):
                own = chosen if n == 0 else chosen.model_copy(update={"name": f"{chosen.name}-{n}"})
                services.append(stack.enter_context(opened(own, each)))
            app = create_app(chosen, services)
            config = uvicorn.Config(
                app,
                host="127.0.0.1",
                port=0,
                log_level="warning",
                http=http_protocol(chosen, app.state.registry),
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()

            def stop() -> None:
                server.should_exit = True
                thread.join()

            stack.callback(stop)
            until(lambda: server.started)
            port = server.servers[0].sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            http = stack.enter_context(httpx.Client(base_url=url, timeout=30))
            first = (loaded or (model,))[0]
            return RunningServer(http, services[0], url, first, tuple(services), app.state.registry)

        yield start


@pytest.fixture
def start_server(
    request: pytest.FixtureRequest, redis_client: redis.Redis, model: LoadedModel, tmp_path: Path
) -> Iterator[Callable[..., RunningServer]]:
    """Function `start_server(*models, **settings)` that starts a server, of `model` by default, for this test.

    Of several models, the first has the name given in the settings; the others have that name and a number.
    """
    with starting(request, redis_client, model, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_module_server(
    request: pytest.FixtureRequest,
    redis_client: redis.Redis,
    model: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., RunningServer]]:
    """`start_server`, with servers that stop after the last test of the module."""
    with starting(request, redis_client, model, tmp_path_factory.mktemp("module")) as start:
        yield start


@pytest.fixture(scope="session")
def shared_server(
    request: pytest.FixtureRequest,
    redis_client: redis.Redis,
    model: LoadedModel,
    fitted: FitResult,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """One server for all tests of this process. Tests use `server`, which is the same server after a reset."""
    with starting(request, redis_client, model, tmp_path_factory.mktemp("shared")) as start:
        yield with_ranges(start(), fitted)


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """The shared server, with the ranges of `fitted` active and nothing erased."""
    shared_server.reset()
    return shared_server


@pytest.fixture
def fresh_server(start_server: Callable[..., RunningServer], fitted: FitResult) -> RunningServer:
    """A server for this test alone, with the ranges of `fitted` active."""
    return with_ranges(start_server(), fitted)


def with_ranges(running: RunningServer, *ranges: FitResult | Ranges) -> RunningServer:
    """Publish and activate ranges on a server, one for each of its models. The first ones are those of a reset."""
    pairs = tuple(each if isinstance(each, tuple) else (each.range_set, each.inspect) for each in ranges)
    for service, (range_set, inspect) in zip(running.services, pairs, strict=True):
        service.store.activate(service.store.range_sets.publish(range_set, inspect))
        service.mirror.refresh()
    running.initial_ranges = running.initial_ranges or pairs
    return running


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of another family than `model`, with other labels; the two share the label "Sports"."""
    from tests.workers.checkpoints import save_tiny
    from workers.models.loading import load_model

    path = save_tiny("distilbert", tmp_path_factory.mktemp("several") / "pets", labels=OTHER_LABELS)
    return load_model(str(path), device="cpu")


def random_ranges(of: ModelIdentity, seed: int, concepts: Sequence[str] = ()) -> Ranges:
    """Make random ranges of concepts (default: the labels) for a model, at all of its blocks."""
    return random_range_set(
        seed, concepts or of.labels, hidden=of.hidden_size, n_layers=of.n_layers, fingerprint=of.fingerprint
    )


@pytest.fixture
def two_models(start_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel) -> RunningServer:
    """A server of two models for this test alone, with random ranges active for both."""
    return with_ranges(start_server(model, other), random_ranges(model.identity, 0), random_ranges(other.identity, 1))


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A Redis for the tests of one module. Tests use `own_redis`, which empties it."""
    directory = tmp_path_factory.mktemp("keys-redis")
    with connect(None, directory) as client:
        assert isinstance(client, EmbeddedRedis)
        client.config_set("appendfsync", "no")  # as in `redis_client`
        yield client
    end_redis(directory)


@pytest.fixture
def own_redis(redis_of_module: EmbeddedRedis) -> EmbeddedRedis:
    """An empty Redis that no other module uses: API keys apply to every server of a Redis.

    Name this fixture before `start_server`, so that the servers stop before the next test empties it.
    """
    redis_of_module.flushall()
    return redis_of_module


@pytest.fixture
def server_with_keys(
    own_redis: EmbeddedRedis, start_server: Callable[..., RunningServer], fitted: FitResult, tmp_path: Path
) -> tuple[RunningServer, dict[str, str], ApiKeyStore]:
    """A server that requires API keys, a token for each scope, and the key store."""
    keys = ApiKeyStore(own_redis)
    tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
    running = with_ranges(start_server(redis_url=own_redis.url), fitted)
    return running, tokens, keys


KeyedServer = tuple[RunningServer, dict[str, str]]


@pytest.fixture(scope="session")
def shared_keyed_server(
    request: pytest.FixtureRequest, model: LoadedModel, fitted: FitResult, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedServer]:
    directory = tmp_path_factory.mktemp("keyed")
    with connect(None, directory) as client, starting(request, client, model, directory) as start:
        keys = ApiKeyStore(client)
        tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
        yield with_ranges(start(), fitted), tokens
    end_redis(directory)


@pytest.fixture
def keyed_server(shared_keyed_server: KeyedServer) -> KeyedServer:
    """A server that requires API keys, and a token of each scope; nothing is erased. All tests share it."""
    shared_keyed_server[0].reset()
    return shared_keyed_server


@pytest.fixture
def problem() -> Callable[[httpx.Response, int, str], dict[str, Any]]:
    """Function `problem(response, status, code)` that checks the form of an error and returns its body."""

    def check(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
        request = response.request
        # endpoints of other protocols (Hugging Face, vLLM, …) answer with plain JSON
        plain = bool(dialects_of(request.method, request.url.path))
        media_type = "application/json" if plain else "application/problem+json"
        assert (response.status_code, response.headers["content-type"]) == (status, media_type), response.text
        body: dict[str, Any] = response.json()
        assert body["code"] == code, body
        assert (body["status"], body["request_id"]) == (status, response.headers["x-request-id"])
        assert {"type", "title", "detail"} <= body.keys()
        return body

    return check
