"""`GET /health`: what clients of several servers ask before they send anything."""

import asyncio
from collections.abc import Callable

import jsonschema
from huggingface_hub import AsyncInferenceClient, InferenceClient
from tei_client import HttpClient

from range_store.api_keys import KeyStore
from tests.e2e.dropin.protocols import TEI_ERROR, refused
from tests.servers import RunningServer, with_ranges
from workers.fitting.fit import Fitted


def healthy(url: str) -> set[bool]:
    """What the clients of huggingface_hub say, which ask here; that of tei-client reads `/info`."""
    waiting = AsyncInferenceClient(model=url, provider="hf-inference")
    return {InferenceClient(model=url, provider="hf-inference").health_check(), asyncio.run(waiting.health_check())}


def test_it_follows_readiness(start_server: Callable[..., RunningServer], fitted: Fitted) -> None:
    running = start_server()  # no range set is active
    said = refused(running.http.get("/health"), 503, "not_ready")
    jsonschema.validate(said, TEI_ERROR)
    assert said["error_type"] == "Unhealthy"
    asked = running.http.get("/readyz").json()
    assert (said["checks"], said["detail"]) == (asked["checks"], asked["detail"])
    assert healthy(running.url) == {False}

    with_ranges(running, fitted)
    good = running.http.get("/health")
    assert (good.status_code, good.content) == (200, b"")
    assert healthy(running.url) == {True}

    running.service.engine.drain()
    assert refused(running.http.get("/health"), 503, "not_ready")["checks"]["engine"] is False
    assert healthy(running.url) == {False}


def test_of_several_models_each_must_be_ready(two_models: RunningServer) -> None:
    assert two_models.http.get("/health").status_code == 200
    two_models.services[1].engine.drain()
    refused(two_models.http.get("/health"), 503, "not_ready")


def test_probes_need_no_key_and_clients_that_read_more_do(
    server_with_keys: tuple[RunningServer, dict[str, str], KeyStore],
) -> None:
    running, tokens, _ = server_with_keys
    assert running.http.get("/health").status_code == 200
    assert healthy(running.url) == {True}
    assert not HttpClient(running.url).health()
    assert HttpClient(running.url, headers={"Authorization": f"Bearer {tokens['read']}"}).health()
    client = InferenceClient(model=running.url, provider="hf-inference", token=tokens["read"])
    assert client.get_endpoint_info()["model_id"] == running.service.name
