"""Label-token and few-shot classifiers over HTTP, and ranges of MLP outputs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis

from app.serving.serve import open_service
from app.settings import Settings
from range_store.domain.erasure import Erasure
from range_store.domain.plan import resolve
from range_store.embedded.connection import EmbeddedRedis
from tests.e2e.dropin.protocols import refused
from tests.servers import RunningServer, with_ranges
from tests.workers.checkpoints import LABELS, TEMPLATE, save_label_token, save_language_model
from tests.workers.masking import edits_of
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.loading import load_corpus
from workers.fitting.fit import FitResult, fit
from workers.models.loading import LoadedModel, load_model

TEXTS = ["the cup final went to extra time", "a chip was patented", "voters queued at dawn after a long night"]
KINDS = ("label-token/gpt2", "few-shot/llama")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, FitResult]:
    """A random model of each kind, and its ranges at every block."""
    which, family = request.param.split("/")
    directory = tmp_path_factory.mktemp("kinds")
    if which == "label-token":
        model = load_model(str(save_label_token(family, directory)), device="cpu")
    else:
        source, template = few_shot(family, directory)
        model = load_model(source, device="cpu", template=template)
    assert model.identity.kind == which
    path = write_jsonl(directory / "train.jsonl", labelled_texts(40, seed=1))
    return model, fit(model, load_corpus(str(path), labels=LABELS), layers="all", bins=16)


def few_shot(family: str, directory: Path) -> tuple[str, str]:
    """Write a language model and a prompt template; return their paths."""
    (directory / "tiny.json").write_text(json.dumps(TEMPLATE))
    source = save_language_model(family, directory / "lm")
    return str(source), str(directory / "tiny.json")


@pytest.fixture(scope="module")
def shared_server_of_kind(
    start_module_server: Callable[..., RunningServer], kind: tuple[LoadedModel, FitResult]
) -> RunningServer:
    model, fitted = kind
    return with_ranges(start_module_server(model), fitted)


@pytest.fixture
def server_of_kind(shared_server_of_kind: RunningServer) -> RunningServer:
    shared_server_of_kind.reset()
    return shared_server_of_kind


def test_label_token_and_few_shot_models_are_served_and_steered(
    kind: tuple[LoadedModel, FitResult], server_of_kind: RunningServer
) -> None:
    model, fitted = kind
    (listed,) = server_of_kind.http.get("/v1/models").json()["models"]
    assert (listed["kind"], listed["labels"], listed["split"]) == (model.identity.kind, list(LABELS), True)
    assert listed["template"] == ("tiny@1" if model.identity.kind == "few-shot" else None)

    batch = model.tokens.batch(model.tokens.encode(TEXTS))
    bare = model.steered.logits(batch).softmax(dim=1).numpy()
    plain = server_of_kind.classify(TEXTS, erase=[]).json()["results"]
    np.testing.assert_allclose(in_order(plain), bare, atol=1e-5)

    for layers in ([-1], [0], [0, 2]):
        erase: dict[str, Any] = {"concept": "Sports", "tau": 1.0, "top_fraction": 1.0, "layer": layers}
        answer = server_of_kind.classify(TEXTS, erase=[erase], compare=True).json()
        resolved = tuple(layer % 3 for layer in layers)
        erasure = Erasure(concept="Sports", tau=1.0, top_fraction=1.0, layers=resolved)
        plan = resolve(fitted.range_set, [erasure])
        table = edits_of([plan], len(batch.read))
        expected = model.steered.hooked(batch, table).softmax(dim=1).numpy()
        np.testing.assert_allclose(in_order(answer["results"]), expected, atol=1e-4)
        np.testing.assert_allclose(in_order([each["baseline"] for each in answer["results"]]), bare, atol=1e-5)
        assert [each["masked_neurons"] for each in answer["results"]] == table.masked.tolist()
        assert np.abs(expected - bare).max() > 1e-3, "the erasure must change the scores"

    assert server_of_kind.http.put("/v1/erasures/World", json={"method": "neuron"}).status_code == 200
    live = server_of_kind.classify(TEXTS[0]).json()
    assert live["erasure"]["source"] == "live"
    assert live["results"][0]["masked_neurons"] == 9, "⌊0.3 · 32⌋"
    for path in ("/v1/concepts", "/v1/concepts/Sports/ranges", "/v1/neurons/-1/3", "/v1/overlap", "/v1/range-sets"):
        response = server_of_kind.http.get(path)
        assert response.status_code == 200, response.text

    for path, inputs in (("/predict", ["a", ["b", "c"]]), ("/", ["a", {"text": "b", "text_pair": "c"}])):
        body = refused(server_of_kind.http.post(path, json={"inputs": inputs}), 422, "unsupported")
        assert body["error"].startswith("input 1 is a pair of texts, and a label-token or few-shot classifier")


def in_order(results: list[dict[str, Any]]) -> np.ndarray:
    """Return the scores in the order of the labels, [N, K]."""
    return np.array([[{s["label"]: s["score"] for s in each["scores"]}[label] for label in LABELS] for each in results])


def test_long_text_is_truncated_and_the_prompt_is_kept(
    server_of_kind: RunningServer, problem: Callable[[httpx.Response, int, str], dict[str, Any]]
) -> None:
    long = "the keeper saved a penalty " * 60
    assert server_of_kind.classify(long, erase=[]).json()["results"][0]["truncated"]
    problem(server_of_kind.classify(long, erase=[], truncate=False), 422, "text_too_long")
    assert server_of_kind.classify("", erase=[]).status_code == 200, "the prompt makes even an empty text valid"


def test_template_of_the_settings_makes_a_few_shot_classifier(redis_client: redis.Redis, tmp_path: Path) -> None:
    assert isinstance(redis_client, EmbeddedRedis)
    source, template = few_shot("gpt2", tmp_path)
    own: dict[str, Any] = {"name": "few-shot", "redis_url": redis_client.url, "data_dir": tmp_path}
    with open_service(Settings(model=source, template=template, device="cpu", **own)) as service:
        assert (service.model.identity.kind, service.model.template) == ("few-shot", "tiny@1")


def test_erasing_mlp_outputs_matches_a_forward_pass_with_hooks(
    server: RunningServer, model: LoadedModel, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", labelled_texts(40, seed=1))
    corpus = load_corpus(str(path), labels=model.identity.labels)
    inside = fit(model, corpus, layers=(0, 2), site="mlp_output", bins=16)
    with_ranges(server, inside)
    erase = {"concept": "Sports", "method": "neuron", "top_fraction": 1.0, "layer": 0}
    answer = server.classify(TEXTS, erase=[erase], compare=True).json()
    batch = replace(model.tokens.batch(model.tokens.encode(TEXTS)), packing=None)
    bare = model.steered.logits(batch).softmax(dim=1).numpy()
    place = model.steered.blocks[0].get_submodule("output.dense")
    handle = place.register_forward_hook(lambda module, args, output: output * ~batch.mask.unsqueeze(-1))
    expected = model.steered.logits(batch).softmax(dim=1).numpy()
    handle.remove()
    labels = model.identity.labels
    for results, values in (
        (answer["results"], expected),
        ([each["baseline"] for each in answer["results"]], bare),
        (server.classify(TEXTS, erase=[]).json()["results"], bare),
    ):
        found = [[{s["label"]: s["score"] for s in each["scores"]}[label] for label in labels] for each in results]
        np.testing.assert_allclose(found, values, atol=1e-5)
    assert [each["masked_neurons"] for each in answer["results"]] == [32] * 3
