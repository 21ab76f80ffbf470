"""`GET /health` and the readiness routes of other protocols."""

import asyncio
from collections.abc import Callable

import httpx
import jsonschema
import pytest
import tritonclient.http as triton
from huggingface_hub import AsyncInferenceClient, InferenceClient
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.errors import ServiceUnavailableError
from tei_client import HttpClient

from tests.e2e.dropin.protocols import TEI_ERROR, refused
from tests.servers import KeyedServer, RunningServer, with_ranges
from workers.fitting.fit import FitResult


def health_checks(url: str) -> set[bool]:
    """The results of every client that has a health check without a key."""
    asynchronous = AsyncInferenceClient(model=url, provider="hf-inference")
    with triton.InferenceServerClient(url.removeprefix("http://")) as triton_client:
        assert triton_client.is_server_live()
        return {
            InferenceClient(model=url, provider="hf-inference").health_check(),
            asyncio.run(asynchronous.health_check()),
            triton_client.is_server_ready(),
        }


def test_health_follows_readiness(start_server: Callable[..., RunningServer], fitted: FitResult) -> None:
    running = start_server()  # no range set is active
    body = refused(running.http.get("/health"), 503, "not_ready")
    jsonschema.validate(body, TEI_ERROR)
    assert body["error_type"] == "Unhealthy"
    ready = running.http.get("/readyz").json()
    assert (body["checks"], body["detail"]) == (ready["checks"], ready["detail"])
    for path in ("/v2/health/ready", f"/v2/models/{running.service.name}/ready"):
        refused(running.http.get(path), 503, "not_ready")
    assert running.http.get("/v2/health/live").json() == {"live": True}
    assert health_checks(running.url) == {False}

    with_ranges(running, fitted)
    healthy = running.http.get("/health")
    assert (healthy.status_code, healthy.content) == (200, b"")
    assert health_checks(running.url) == {True}

    running.service.engine.drain()
    assert refused(running.http.get("/health"), 503, "not_ready")["checks"]["engine"] is False
    assert health_checks(running.url) == {False}
    with httpx.Client() as http, pytest.raises(ServiceUnavailableError) as draining:
        OpenInferenceClient(base_url=running.url, httpx_client=http).check_server_readiness()
    assert isinstance(draining.value.body["error"], str)


def test_health_requires_every_model_to_be_ready(two_models: RunningServer) -> None:
    assert two_models.http.get("/health").status_code == 200
    two_models.services[1].engine.drain()
    refused(two_models.http.get("/health"), 503, "not_ready")


def test_health_checks_need_no_key_and_metadata_does(keyed_server: KeyedServer) -> None:
    running, tokens = keyed_server
    assert running.http.get("/health").status_code == 200
    assert health_checks(running.url) == {True}
    assert not HttpClient(running.url).health()  # reads `/info`
    assert HttpClient(running.url, headers={"Authorization": f"Bearer {tokens['read']}"}).health()
    client = InferenceClient(model=running.url, provider="hf-inference", token=tokens["read"])
    assert client.get_endpoint_info()["model_id"] == running.service.name
