"""A real service behind a real uvicorn, on a tiny fitted model; tests speak HTTP to it."""

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import torch
import uvicorn
from prometheus_client import CollectorRegistry

from app.main import create_app
from app.protocol import bounded_head
from app.routes.dropin import dialect_of
from app.service import Service
from app.settings import Settings
from app.wiring import open_service
from range_store.api_keys import KeyStore
from range_store.embedded import EmbeddedRedis, connect
from range_store.range_set import RangeSet
from range_store.store import RangeStore
from tests.e2e.on_ray import Opened, cluster, on_fleet  # noqa: F401 (fixtures)
from tests.processes import end_redis
from tests.range_store.builders import random_range_set
from tests.range_store.waiting import until
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.fitting.corpus import load_corpus
from workers.fitting.fit import Fitted, fit
from workers.models.loading import LoadedModel, load_model

LABELS = ("World", "Sports", "Business", "Sci/Tech")
OTHER_LABELS = ("Cats", "Dogs", "Sports")


@dataclass
class Running:
    """A server to talk to, and what is behind it: `service` and `model` are the first of several."""

    http: httpx.Client
    service: Service
    url: str
    model: LoadedModel
    services: tuple[Service, ...]
    registry: CollectorRegistry

    def classify(self, inputs: Any, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/classify", json={"inputs": inputs, **fields})

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """A sample of /metrics: of the first model, or of the process where it has no label for one."""
        of_model = self.registry.get_sample_value(name, {"model": self.service.name, **(labels or {})})
        return of_model if of_model is not None else self.registry.get_sample_value(name, dict(labels or {}))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    path = save_tiny("bert", tmp_path_factory.mktemp("e2e") / "tiny-news", labels=LABELS)
    return load_model(str(path), device="cpu")


@pytest.fixture(scope="session")
def fitted(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Ranges of the model at its last two blocks; a concept that is no label among them."""
    rows = [(text, "Sci/Tech" if label == "SciTech" else label) for text, label in labelled_texts(90, seed=4)]
    rows += [(f"it rained in {place} all day", "Météo & co") for place in ("Kyiv", "Lima", "Oslo", "Baku")]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
    return fit(model, load_corpus(str(path), labels=LABELS), layers=(-2, -1), bins=64)


@pytest.fixture
def serve(
    request: pytest.FixtureRequest, redis_client: redis.Redis, model: LoadedModel, tmp_path: Path
) -> Iterator[Callable[..., Running]]:
    """`serve(*loaded, **settings)`: start a server (default: of `model`); everything is stopped after the test.

    Of several models the first has the name that the settings say, the others that and a number.
    """
    assert isinstance(redis_client, EmbeddedRedis)
    opened: Opened = request.getfixturevalue("on_fleet") if request.config.getoption("--fleet") else open_service
    with ExitStack() as stack:

        def start(*loaded: LoadedModel, **settings: Any) -> Running:
            named: dict[str, Any] = {
                "name": f"tiny-{uuid.uuid4().hex[:8]}",
                "redis_url": redis_client.url,
                "poll_seconds": 0.2,
            }
            named["data_dir"] = tmp_path
            chosen = Settings(**{**named, **settings})
            services = []
            for n, each in enumerate(loaded or (model,)):
                own = chosen if n == 0 else chosen.model_copy(update={"name": f"{chosen.name}-{n}"})
                services.append(stack.enter_context(opened(own, each)))
            protocol = bounded_head(chosen.max_header_bytes, chosen.header_timeout)
            app = create_app(chosen, services)
            config = uvicorn.Config(
                app,
                host="127.0.0.1",
                port=0,
                log_level="warning",
                http=protocol,
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
            return Running(http, services[0], url, first, tuple(services), app.state.registry)

        yield start


@pytest.fixture
def news(serve: Callable[..., Running], fitted: Fitted) -> Running:
    """A server with an active range set."""
    return ready(serve(), fitted)


def ready(running: Running, fitted: Fitted) -> Running:
    """Publish and activate ranges for a server."""
    store: RangeStore = running.service.store
    store.activate(store.publish(fitted.range_set, fitted.inspect))
    running.service.mirror.refresh()
    return running


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Another family, other labels; one concept has the name of one of the first model's."""
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
def two(serve: Callable[..., Running], model: LoadedModel, other: LoadedModel) -> Running:
    """A server of two models, both with active ranges."""
    running = serve(model, other)
    for seed, service in enumerate(running.services):
        ranges_of(service, seed)
    return running


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A Redis of its own: keys are of a whole store. Ask for it before `serve`, which must leave it first."""
    directory = tmp_path_factory.mktemp("keys-redis")
    with connect(None, directory) as client:
        assert isinstance(client, EmbeddedRedis)
        client.config_set("appendfsync", "no")  # as `redis_client`
        yield client
    end_redis(directory)


@pytest.fixture
def keyed(
    own_redis: EmbeddedRedis, serve: Callable[..., Running], fitted: Fitted, tmp_path: Path
) -> tuple[Running, dict[str, str], KeyStore]:
    """A server on which keys are in force, a token of each scope, and where keys are made."""
    keys = KeyStore(own_redis)
    tokens = {scope: keys.create(f"the-{scope}", [scope])[1] for scope in ("infer", "read", "admin")}
    running = ready(serve(redis_url=own_redis.url, data_dir=tmp_path), fitted)
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
