"""Servers for tests: a real service behind a real uvicorn, on a tiny fitted model; tests speak HTTP to it.

`server` is shared by all tests of a process and is reset before each of them. A test that stops it, breaks it, or
leaves more behind than a reset clears takes `fresh_server`; one that needs settings of its own calls `start_server`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import redis
import uvicorn
from prometheus_client import CollectorRegistry

from app.main import create_app
from app.protocol import bounded_head
from app.routes.dropin import dialect_of
from app.service import Service
from app.settings import Settings
from range_store.api_keys import KeyStore
from range_store.embedded import EmbeddedRedis, connect
from range_store.range_set import RangeSet
from tests.processes import end_redis
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.workers.texts import labelled_texts, write_jsonl

if TYPE_CHECKING:  # imported by the fixtures that need torch, so that other tests start without it
    from tests.e2e.on_ray import Opened
    from workers.fitting.fit import Fitted
    from workers.models.loading import LoadedModel

LABELS = ("World", "Sports", "Business", "Sci/Tech")
OTHER_LABELS = ("Cats", "Dogs", "Sports")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class RunningServer:
    """A server to talk to, and what is behind it: `service` and `model` are the first of several."""

    http: httpx.Client
    service: Service
    url: str
    model: LoadedModel
    services: tuple[Service, ...]
    registry: CollectorRegistry
    counted: Samples = field(default_factory=dict)
    """Counters at the last reset: `value` gives the difference."""

    def classify(self, inputs: Any, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/classify", json={"inputs": inputs, **fields})

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """A sample of /metrics, of the first model where it has a label for one; a counter since the last reset."""
        for chosen in ({"model": self.service.name, **(labels or {})}, dict(labels or {})):
            value = self.registry.get_sample_value(name, chosen)
            if value is not None:
                return value - self.counted.get((name, frozenset(chosen.items())), 0.0)
        return None

    def reset(self, fitted: Fitted) -> None:
        """The state of a server that was just started: `fitted` active, nothing erased, counters at zero."""
        store = self.service.store
        until(lambda: self.registry.get_sample_value("neuronlens_queue_texts", {"model": self.service.name}) == 0)
        if store.live().range_set != fitted.range_set.id:
            store.activate(store.publish(fitted.range_set, fitted.inspect), force=True)
        if store.live().erasures:
            store.set_erasures([])
        self.service.mirror.refresh()
        self.counted = {
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
def fitted(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Ranges of the model at its last two blocks; one concept is no label of the model."""
    from workers.fitting.corpus import load_corpus
    from workers.fitting.fit import fit

    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(90, seed=4)]
    rows += [(f"it rained in {place} all day", "Météo & co") for place in ("Kyiv", "Lima", "Oslo", "Baku")]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
    return fit(model, load_corpus(str(path), labels=LABELS), layers=(-2, -1), bins=64)


@contextmanager
def starting(
    request: pytest.FixtureRequest, redis_client: redis.Redis, model: LoadedModel, data_dir: Path
) -> Iterator[Callable[..., RunningServer]]:
    """`start(*loaded, **settings)` inside; leaving stops every server that it started."""
    from app.wiring import open_service

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
                http=bounded_head(chosen.max_header_bytes, chosen.header_timeout),
                timeout_keep_alive=chosen.keep_alive,
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
    """`start_server(*loaded, **settings)`: start a server (default: of `model`); all are stopped after the test.

    Of several models the first has the name that the settings say, the others that name and a number.
    """
    with starting(request, redis_client, model, tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def shared_server(
    request: pytest.FixtureRequest,
    redis_client: redis.Redis,
    model: LoadedModel,
    fitted: Fitted,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """One server for all tests of this process; ask for `server`, which resets it."""
    with starting(request, redis_client, model, tmp_path_factory.mktemp("shared")) as start:
        yield with_ranges(start(), fitted)


@pytest.fixture
def server(shared_server: RunningServer, fitted: Fitted) -> RunningServer:
    """The shared server, with an active range set and nothing erased."""
    shared_server.reset(fitted)
    return shared_server


@pytest.fixture
def fresh_server(start_server: Callable[..., RunningServer], fitted: Fitted) -> RunningServer:
    """A server of this test's own, with an active range set."""
    return with_ranges(start_server(), fitted)


def with_ranges(running: RunningServer, fitted: Fitted) -> RunningServer:
    """Publish and activate ranges for a server."""
    store = running.service.store
    store.activate(store.publish(fitted.range_set, fitted.inspect))
    running.service.mirror.refresh()
    return running


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Another family, other labels; one label is also one of the first model's."""
    from tests.workers.checkpoints import save_tiny
    from workers.models.loading import load_model

    path = save_tiny("distilbert", tmp_path_factory.mktemp("several") / "pets", labels=OTHER_LABELS)
    return load_model(str(path), device="cpu")


def ranges_of(service: Service, seed: int) -> RangeSet:
    """Made-up ranges of a model's own labels, published and active."""
    identity = service.model.identity
    made = random_range_set(
        seed, identity.labels, hidden=identity.hidden_size, n_layers=identity.n_layers, fingerprint=identity.fingerprint
    )
    service.store.activate(service.store.publish(*made))
    service.mirror.refresh()
    return made[0]


@pytest.fixture
def two_models(start_server: Callable[..., RunningServer], model: LoadedModel, other: LoadedModel) -> RunningServer:
    """A server of two models, both with active ranges."""
    running = start_server(model, other)
    for seed, service in enumerate(running.services):
        ranges_of(service, seed)
    return running


@pytest.fixture(scope="module")
def redis_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    directory = tmp_path_factory.mktemp("keys-redis")
    with connect(None, directory) as client:
        assert isinstance(client, EmbeddedRedis)
        client.config_set("appendfsync", "no")  # as `redis_client`
        yield client
    end_redis(directory)


@pytest.fixture
def own_redis(redis_of_module: EmbeddedRedis) -> EmbeddedRedis:
    """An empty Redis that no test of another module uses: API keys belong to a whole store.

    A test asks for it before `start_server`, so that the servers stop before it is emptied.
    """
    redis_of_module.flushall()
    return redis_of_module


@pytest.fixture
def server_with_keys(
    own_redis: EmbeddedRedis, start_server: Callable[..., RunningServer], fitted: Fitted, tmp_path: Path
) -> tuple[RunningServer, dict[str, str], KeyStore]:
    """A server on which keys are in force, a token of each scope, and the store of the keys."""
    keys = KeyStore(own_redis)
    tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
    running = with_ranges(start_server(redis_url=own_redis.url), fitted)
    return running, tokens, keys


@pytest.fixture
def problem() -> Callable[[httpx.Response, int, str], dict[str, Any]]:
    """`problem(response, status, code)`: the body of an error, checked for its form."""

    def check(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
        asked = response.request
        plain = dialect_of({"method": asked.method, "path": asked.url.path}) is not None  # another protocol's words
        media_type = "application/json" if plain else "application/problem+json"
        assert (response.status_code, response.headers["content-type"]) == (status, media_type), response.text
        body: dict[str, Any] = response.json()
        assert body["code"] == code, body
        assert (body["status"], body["request_id"]) == (status, response.headers["x-request-id"])
        assert {"type", "title", "detail"} <= body.keys()
        return body

    return check
