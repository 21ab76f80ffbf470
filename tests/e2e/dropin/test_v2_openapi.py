"""`/v2` with the client that is generated from the OpenAPI document of the Open Inference Protocol."""

from collections.abc import Iterator

import httpx
import pytest
from open_inference.openapi import BadRequestError, InferenceRequest, InferenceResponse, RequestInput, RequestOutput
from open_inference.openapi.client import OpenInferenceClient
from open_inference.openapi.core import ApiError
from open_inference.openapi.errors import NotFoundError

from tests.servers import LABELS, RunningServer
from tests.workers.texts import labelled_texts

TEXTS = [text for text, _ in labelled_texts(3, seed=3)]


@pytest.fixture
def client(server: RunningServer) -> Iterator[OpenInferenceClient]:
    with httpx.Client() as http:
        yield OpenInferenceClient(base_url=server.url, httpx_client=http)


def infer_request(name: str = "text", **fields: object) -> InferenceRequest:
    return InferenceRequest(
        inputs=[RequestInput(name=name, shape=[len(TEXTS)], datatype="BYTES", data=TEXTS)], **fields
    )


def test_metadata_matches_the_document(server: RunningServer, client: OpenInferenceClient) -> None:
    name = server.service.name
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness(name)
    client.check_model_version_readiness(name, "1")
    assert client.read_server_metadata().name == "neuronlens"
    model = client.read_model_metadata(name)
    assert client.read_model_version_metadata(name, "1") == model
    assert [(each.name, each.datatype, each.shape) for each in model.inputs] == [("text", "BYTES", [-1])]
    assert [(each.name, each.datatype, each.shape) for each in model.outputs] == [
        ("label", "BYTES", [-1]),
        ("score", "FP32", [-1]),
        ("probs", "FP32", [-1, len(LABELS)]),
    ]


def test_replies_match_the_document(server: RunningServer, client: OpenInferenceClient) -> None:
    name = server.service.name
    reply = client.model_infer(name, request=infer_request(id="42", parameters={"top_k": 1}))
    assert isinstance(reply, InferenceResponse)
    assert (reply.id, reply.model_name, reply.model_version) == ("42", name, "1")
    assert [each.name for each in reply.outputs] == ["label", "score", "probs"]
    expected = server.classify(TEXTS).json()["results"]
    assert reply.outputs[0].data.__root__ == [each["label"] for each in expected]
    assert client.model_version_infer(name, "1", request=infer_request(id="42", parameters={"top_k": 1})) == reply
    (only,) = client.model_infer(name, request=infer_request(outputs=[RequestOutput(name="score")])).outputs
    assert (only.name, only.shape) == ("score", [len(TEXTS)])
    bare = client.model_infer(name, request=infer_request())
    assert bare.id is None


def test_errors_match_the_document(server: RunningServer, client: OpenInferenceClient) -> None:
    name = server.service.name
    with pytest.raises(BadRequestError) as wrong:
        client.model_infer(name, request=infer_request("other"))
    assert isinstance(wrong.value.body["error"], str)
    with pytest.raises(ApiError) as unknown:  # the document has no 404 here
        client.model_infer("another", request=infer_request())
    assert (unknown.value.status_code, type(unknown.value.body["error"])) == (404, str)
    for missing in (("another", "1"), (name, "2")):
        with pytest.raises(NotFoundError) as gone:
            client.check_model_version_readiness(*missing)
        assert isinstance(gone.value.body["error"], str)
