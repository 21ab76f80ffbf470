"""`/v2` with Triton's own HTTP client and the schemas of the Open Inference Protocol."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from range_store.domain.erasure import Erasure
from range_store.domain.live import LiveErasure
from tests.e2e.dropin.protocols import V2_ERROR, V2_INFERRED, V2_MODEL, V2_SERVER, refused
from tests.servers import LABELS, KeyedServer, RunningServer
from tests.workers.texts import labelled_texts

TEXTS = [text for text, _ in labelled_texts(3, seed=3)] + ["Ünïcödé 日本"]
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}


@pytest.fixture
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def tensor(texts: list[str], *, binary: bool, column: bool = False) -> triton.InferInput:
    values = np.array([text.encode() for text in texts], dtype=np.object_)
    values = values[:, None] if column else values
    made = triton.InferInput("text", list(values.shape), "BYTES")
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def strings(values: Any) -> list[str]:
    return [each.decode() if isinstance(each, bytes) else each for each in values.ravel()]


def infer(running: RunningServer, path: str = "infer", **body: Any) -> Any:
    request = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}], **body}
    reply = running.http.post(f"/v2/models/{running.service.name}/{path}", json=request)
    assert reply.status_code == 200, reply.text
    jsonschema.validate(reply.json(), V2_INFERRED)
    return reply.json()


def output(reply: Any, name: str) -> Any:
    (found,) = (each for each in reply["outputs"] if each["name"] == name)
    return found


def test_the_client_reads_health_and_metadata(server: RunningServer, client: triton.InferenceServerClient) -> None:
    name = server.service.name
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    assert client.is_model_ready(name, "1")
    assert not client.is_model_ready("another")
    metadata, model = client.get_server_metadata(), client.get_model_metadata(name)
    jsonschema.validate(metadata, V2_SERVER)
    jsonschema.validate(model, V2_MODEL)
    assert client.get_model_metadata(name, "1") == model
    assert (model["name"], model["parameters"]["labels"]) == (name, list(LABELS))
    assert server.http.get("/v2/").json() == metadata


@pytest.mark.parametrize(
    "path", ["config", "stats", "trace/setting", "versions/1/config", "versions/1/stats", "x/ready"]
)
def test_a_path_that_is_not_served_is_told_from_a_model_that_is_not(server: RunningServer, path: str) -> None:
    name = server.service.name
    error = refused(server.http.get(f"/v2/models/{name}/{path}"), 404, "not_found")["error"]
    assert error == f"no such path below the model {name!r}; see /docs"
    refused(server.http.get(f"/v2/models/another/{path}"), 404, "unknown_model")


def test_the_client_is_told_that_there_is_no_configuration(
    server: RunningServer, client: triton.InferenceServerClient
) -> None:
    with pytest.raises(InferenceServerException, match="no such path"):
        client.get_model_config(server.service.name)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_the_client_gets_the_tensors(
    server: RunningServer, client: triton.InferenceServerClient, binary: bool, column: bool
) -> None:
    reply = client.infer(server.service.name, [tensor(TEXTS, binary=binary, column=column)], request_id="42")
    expected = server.classify(TEXTS).json()["results"]
    assert strings(reply.as_numpy("label")) == [each["label"] for each in expected]
    assert reply.as_numpy("score") == pytest.approx([each["score"] for each in expected], abs=1e-6)
    probs = reply.as_numpy("probs")
    assert probs.shape == (len(TEXTS), len(LABELS))
    for row, each in zip(probs, expected, strict=True):
        by_label = {score["label"]: score["score"] for score in each["scores"]}
        assert list(row) == pytest.approx([by_label[label] for label in LABELS], abs=1e-6)
    assert reply.get_response()["id"] == "42"
    jsonschema.validate(reply.get_response(), V2_INFERRED)


def test_parameters_erase_concepts_and_compare(server: RunningServer, client: triton.InferenceServerClient) -> None:
    erase = [{"concept": "Sports", "top_fraction": 1.0}, "Météo & co"]
    reply = client.infer(
        server.service.name,
        [tensor(TEXTS, binary=True)],
        outputs=[triton.InferRequestedOutput("baseline_label"), triton.InferRequestedOutput("label")],
        parameters={"erase": json.dumps(erase), "compare": True, "top_k": 2},
    )
    expected = server.classify(TEXTS, erase=erase, compare=True).json()
    assert [each["name"] for each in reply.get_response()["outputs"]] == ["baseline_label", "label"]
    best = [score["label"] for each in expected["results"] for score in each["scores"][:2]]
    assert strings(reply.as_numpy("label")) == best
    assert reply.as_numpy("label").shape == (len(TEXTS), 2)
    bare = [score["label"] for each in expected["results"] for score in each["baseline"]["scores"][:2]]
    assert strings(reply.as_numpy("baseline_label")) == bare
    assert reply.get_response()["parameters"]["erased"] == "Sports,M%C3%A9t%C3%A9o%20%26%20co"


def test_erasures_are_json_or_json_in_a_string(server: RunningServer) -> None:
    erase = {"concepts": ["Sports"], "top_fraction": 1.0}
    replies = [infer(server, parameters={"erase": form}) for form in (erase, json.dumps(erase))]
    assert replies[0] == replies[1]
    assert replies[0]["parameters"]["source"] == "request"
    assert infer(server, parameters={"erase": "null"}) == infer(server) == infer(server, parameters={})


def test_a_request_id_that_is_not_unicode_is_rejected(server: RunningServer) -> None:
    request = {"id": "\ud800", "inputs": [TEXT]}
    path, headers = f"/v2/models/{server.service.name}/infer", {"Content-Type": "application/json"}
    refused(server.http.post(path, content=json.dumps(request), headers=headers), 400, "invalid")


def test_without_erasures_the_baseline_equals_the_answer(server: RunningServer) -> None:
    reply = infer(server, parameters={"compare": True})
    assert output(reply, "baseline_probs")["data"] == output(reply, "probs")["data"]


def test_comparing_requires_admin_while_an_erasure_is_enforced(keyed_server: KeyedServer) -> None:
    running, tokens = keyed_server
    name, store, mirror = running.service.name, running.service.store, running.service.mirror
    store.set_erasure(LiveErasure(erasure=Erasure(concept="World"), enforced=True))
    mirror.refresh()
    texts = [tensor(TEXTS, binary=False)]
    headers = {scope: {"Authorization": f"Bearer {token}"} for scope, token in tokens.items()}
    with triton.InferenceServerClient(running.url.removeprefix("http://")) as client:
        with pytest.raises(InferenceServerException, match="needs a key with scope admin") as refusal:
            client.infer(name, texts, headers=headers["infer"], parameters={"compare": True})
        assert refusal.value.status() == "403"
        assert client.infer(name, texts, headers=headers["admin"], parameters={"compare": True}) is not None
        assert client.is_server_ready()  # without a key
        with pytest.raises(InferenceServerException, match="key") as refusal:
            client.get_model_metadata(name)
        assert refusal.value.status() == "401"
        assert client.get_model_metadata(name, headers=headers["read"])["name"] == name


def test_the_client_reports_why_a_request_was_rejected(
    server: RunningServer, client: triton.InferenceServerClient
) -> None:
    with pytest.raises(InferenceServerException, match="no such model") as refusal:
        client.infer("another", [tensor(TEXTS, binary=True)])
    assert refusal.value.status() == "404"
    with pytest.raises(InferenceServerException, match="no such version"):
        client.get_model_metadata(server.service.name, "2")
    with pytest.raises(InferenceServerException, match="no such output; there are label, score, probs"):
        client.infer(
            server.service.name, [tensor(TEXTS, binary=True)], outputs=[triton.InferRequestedOutput("baseline_label")]
        )
    with pytest.raises(InferenceServerException, match="unknown concept 'Weather'"):
        client.infer(server.service.name, [tensor(TEXTS, binary=True)], parameters={"erase": '["Weather"]'})


def test_the_only_version_is_1(server: RunningServer) -> None:
    reply = infer(server, "versions/1/infer")
    assert reply == infer(server)
    assert reply["model_version"] == "1"
    refused(server.http.post(f"/v2/models/{server.service.name}/versions/2/infer", json={}), 404, "unknown_model")
    gone = server.http.get(f"/v2/models/{server.service.name}/versions/2/ready")
    jsonschema.validate(refused(gone, 404, "unknown_model"), V2_ERROR)


@pytest.fixture(scope="module")
def slashed_server(start_module_server: Callable[..., RunningServer]) -> RunningServer:
    """A server whose model has a name with slashes, and that takes small bodies only."""
    return start_module_server(name="org/a/model", max_body_bytes=2000)


def test_a_model_may_have_a_name_with_slashes(slashed_server: RunningServer) -> None:
    running = slashed_server
    assert running.http.get("/v2/models/org/a/model").json()["name"] == "org/a/model"
    assert running.http.get("/v2/models/org%2Fa%2Fmodel/versions/1").json()["name"] == "org/a/model"
    for path in ("infer", "versions/1/infer"):
        assert running.http.post(f"/v2/models/org/a/model/{path}", json={"inputs": [TEXT]}).status_code == 200


def test_what_a_foreign_page_can_send_is_not_computed(server: RunningServer) -> None:
    """A browser sends these without asking the server first."""
    path, content = f"/v2/models/{server.service.name}/infer", json.dumps({"inputs": [TEXT]})

    def post(**headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return server.http.post(path, content=content, headers=named)

    origin = "https://evil.example"
    size = str(len(content))
    for kind in ("text/plain", "text/plain; application/json", "application/x-www-form-urlencoded"):
        refused(post(content_type=kind), 415, "unsupported_media_type")
        refused(post(content_type=kind, inference_header_content_length=size), 415, "unsupported_media_type")
    refused(post(origin=origin), 415, "unsupported_media_type")
    for kind in (
        "application/json",
        "application/json; charset=utf-8",
        "application/octet-stream",
        "application/x+json",
    ):
        assert post(content_type=kind, origin=origin).status_code == 200
    assert post().status_code == 200, "Triton's client names no type"


def test_a_get_of_a_path_that_infers_is_rejected(server: RunningServer) -> None:
    for path in ("infer", "versions/1/infer"):
        gone = server.http.get(f"/v2/models/{server.service.name}/{path}")
        refused(gone, 405, "method_not_allowed")
        assert gone.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": []},
        {"inputs": [TEXT, TEXT]},
        {"inputs": [{**TEXT, "name": "other"}]},
        {"inputs": [{**TEXT, "datatype": "FP32", "data": [1.0]}]},
        {"inputs": [{**TEXT, "shape": [2]}]},
        {"inputs": [{**TEXT, "shape": []}]},
        {"inputs": [{**TEXT, "shape": [0], "data": []}]},
        {"inputs": [{**TEXT, "shape": [1, 1, 1]}]},
        {"inputs": [{**TEXT, "data": [5]}]},
        {"inputs": [TEXT], "outputs": [{"name": "other"}]},
        {"inputs": [TEXT], "parameters": {"erase": "Sports"}},
        {"inputs": [TEXT], "parameters": {"erase": "[" * 100_000}},
        {"inputs": [TEXT], "parameters": {"top_k": 0}},
    ],
)
def test_invalid_requests_are_rejected(server: RunningServer, body: Any) -> None:
    reply = server.http.post(f"/v2/models/{server.service.name}/infer", json=body)
    jsonschema.validate(refused(reply, 400, "invalid"), V2_ERROR)


@pytest.mark.parametrize("length", ["", "x", "-1", "9" * 30, "5", "²", "0"])
def test_a_wrong_length_of_the_json_header_is_rejected(server: RunningServer, length: str) -> None:
    body = json.dumps({"inputs": [TEXT]}).encode()
    headers = {"Inference-Header-Content-Length": length.encode()}
    reply = server.http.post(f"/v2/models/{server.service.name}/infer", content=body, headers=headers)
    jsonschema.validate(refused(reply, 400, "malformed"), V2_ERROR)


@pytest.mark.parametrize(
    ("size", "raw"),
    [
        (5, b"\1\0\0\0a" + b"more"),
        (6, b"\1\0\0\0a"),
        (5, b"\2\0\0\0a"),
        (3, b"\1\0\0"),
        (5, b"\1\0\0\0\xff"),
        (-1, b""),
        ("5", b"\1\0\0\0a"),
        (True, b"a"),
    ],
)
def test_malformed_binary_tensors_are_rejected(server: RunningServer, size: Any, raw: bytes) -> None:
    request = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": size}}]
    }
    head = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    reply = server.http.post(f"/v2/models/{server.service.name}/infer", content=head + raw, headers=headers)
    refused(reply, 400, "malformed")


def test_binary_tensors_count_towards_the_limit_of_bodies(slashed_server: RunningServer) -> None:
    running = slashed_server
    with (
        triton.InferenceServerClient(running.url.removeprefix("http://")) as client,
        pytest.raises(InferenceServerException, match="larger than 2000 bytes"),
    ):
        client.infer(running.service.name, [tensor(["a" * 3000], binary=True)])

    def chunks() -> Iterator[bytes]:
        yield from [b"a" * 1000] * 3

    headers = {"Inference-Header-Content-Length": "10"}
    reply = running.http.post(f"/v2/models/{running.service.name}/infer", content=chunks(), headers=headers)
    refused(reply, 413, "body_too_large")
