"""Label-token and few-shot classifiers behind real HTTP: every call works for them as for classifiers with a head."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from range_store.erasure import Erasure
from range_store.plan import resolve
from tests.e2e.dropin.protocols import refused
from tests.servers import RunningServer, with_ranges
from tests.workers.checkpoints import LABELS, TEMPLATE, save_label_token, save_language_model
from tests.workers.texts import labelled_texts, write_jsonl
from workers.engine.masks import DevicePlan, MaskTable
from workers.fitting.corpus import load_corpus
from workers.fitting.fit import Fitted, fit
from workers.models.loading import LoadedModel, load_model

TEXTS = ["the cup final went to extra time", "a chip was patented", "voters queued at dawn after a long night"]
KINDS = ("label-token", "few-shot")


@pytest.fixture(scope="module", params=[f"{kind}/{family}" for kind in KINDS for family in ("gpt2", "llama")])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Fitted]:
    """A random model of a kind, and ranges of it at every block."""
    which, family = request.param.split("/")
    directory = tmp_path_factory.mktemp("kinds")
    if which == "label-token":
        model = load_model(str(save_label_token(family, directory)), device="cpu")
    else:
        (directory / "tiny.json").write_text(json.dumps(TEMPLATE))
        source = save_language_model(family, directory / "lm")
        model = load_model(str(source), device="cpu", template=str(directory / "tiny.json"))
    assert model.identity.kind == which
    path = write_jsonl(directory / "train.jsonl", labelled_texts(80, seed=1))
    return model, fit(model, load_corpus(str(path), labels=LABELS), layers="all", bins=16)


def test_it_is_served_steered_and_inspected(
    kind: tuple[LoadedModel, Fitted], start_server: Callable[..., RunningServer]
) -> None:
    model, fitted = kind
    running = with_ranges(start_server(model), fitted)
    (shown,) = running.http.get("/v1/models").json()["models"]
    assert (shown["kind"], shown["labels"], shown["split"]) == (model.identity.kind, list(LABELS), True)
    assert shown["template"] == ("tiny@1" if model.identity.kind == "few-shot" else None)

    batch = model.tokens.pad([text.ids for text in model.tokens.encode(TEXTS)])
    bare = model.steered.logits(batch).softmax(dim=1).numpy()
    plain = running.classify(TEXTS, erase=[]).json()["results"]
    np.testing.assert_allclose(in_order(plain), bare, atol=1e-5)

    for layers in ([-1], [0], [0, 2]):
        asked: dict[str, Any] = {"concept": "Sports", "tau": 1.0, "top_fraction": 1.0, "layer": layers}
        answer = running.classify(TEXTS, erase=[asked], compare=True).json()
        resolved = tuple(layer % 3 for layer in layers)
        erasure = Erasure(concept="Sports", tau=1.0, top_fraction=1.0, layers=resolved)
        plan = DevicePlan.of(resolve(fitted.range_set, [erasure]), model.device)
        table = MaskTable([plan], batch.read * 0)
        expected = model.steered.hooked(batch, table).softmax(dim=1).numpy()
        np.testing.assert_allclose(in_order(answer["results"]), expected, atol=1e-4)
        np.testing.assert_allclose(in_order([each["baseline"] for each in answer["results"]]), bare, atol=1e-5)
        assert [each["masked_neurons"] for each in answer["results"]] == table.masked.tolist()
        assert np.abs(expected - bare).max() > 1e-3, "the masking must matter, or this shows nothing"

    assert running.http.put("/v1/erasures/World", json={"method": "neuron"}).status_code == 200
    live = running.classify(TEXTS[0]).json()
    assert live["erasure"]["source"] == "live"
    assert live["results"][0]["masked_neurons"] == 9, "⌊0.3 · 32⌋"
    for path in ("/v1/concepts", "/v1/concepts/Sports/ranges", "/v1/neurons/-1/3", "/v1/overlap", "/v1/range-sets"):
        response: httpx.Response = running.http.get(path)
        assert response.status_code == 200, response.text

    for path, inputs in (("/predict", ["a", ["b", "c"]]), ("/", ["a", {"text": "b", "text_pair": "c"}])):
        body = refused(running.http.post(path, json={"inputs": inputs}), 422, "unsupported")
        assert body["error"].startswith("input 1 is a pair of texts, and a label-token or few-shot classifier")


def in_order(results: list[dict[str, Any]]) -> np.ndarray:
    """Scores in the order of the labels, [n, K]."""
    return np.array([[{s["label"]: s["score"] for s in each["scores"]}[label] for label in LABELS] for each in results])


def test_a_text_that_is_too_long_is_cut_and_the_rest_of_the_prompt_stays(
    kind: tuple[LoadedModel, Fitted],
    start_server: Callable[..., RunningServer],
    problem: Callable[[httpx.Response, int, str], dict[str, Any]],
) -> None:
    running = start_server(kind[0])
    long = "the keeper saved a penalty " * 60
    result = running.classify(long, erase=[]).json()["results"][0]
    assert result["truncated"]
    problem(running.classify(long, erase=[], truncate=False), 422, "text_too_long")
    assert running.classify("", erase=[]).status_code == 200, "the prompt is there without a text too"


def test_a_served_template_comes_from_the_settings(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    """As `neuronlens serve --template` does: the model is loaded by the service itself."""
    (tmp_path / "tiny.json").write_text(json.dumps(TEMPLATE))
    source = save_language_model("gpt2", tmp_path / "lm")
    prompted = load_model(str(source), device="cpu", template=str(tmp_path / "tiny.json"), scoring="greedy")
    running = start_server(prompted)
    scores = running.classify("a goal", erase=[]).json()["results"][0]["scores"]
    assert sum(score["score"] for score in scores) == pytest.approx(1.0)


def test_ranges_of_what_an_mlp_adds_are_served_beside_others(
    start_server: Callable[..., RunningServer], model: LoadedModel, fitted: Fitted, tmp_path: Path
) -> None:
    """Masks inside a block cannot share a trunk; they are full passes, and right."""
    running = with_ranges(start_server(), fitted)
    path = write_jsonl(tmp_path / "train.jsonl", labelled_texts(60, seed=1))
    corpus = load_corpus(str(path), labels=model.identity.labels)
    inside = fit(model, corpus, layers=(0, 2), site="mlp_output", bins=16)
    with_ranges(running, inside)
    asked = {"concept": "Sports", "method": "neuron", "top_fraction": 1.0, "layer": 0}
    answer = running.classify(TEXTS, erase=[asked], compare=True).json()
    batch = replace(model.tokens.pad([text.ids for text in model.tokens.encode(TEXTS)]), packing=None)
    bare = model.steered.logits(batch).softmax(dim=1).numpy()
    place = model.steered.blocks[0].get_submodule("output.dense")
    handle = place.register_forward_hook(lambda m, i, out: out * ~batch.mask.unsqueeze(-1))
    expected = model.steered.logits(batch).softmax(dim=1).numpy()
    handle.remove()
    labels = model.identity.labels
    for results, values in (
        (answer["results"], expected),
        ([each["baseline"] for each in answer["results"]], bare),
        (running.classify(TEXTS, erase=[]).json()["results"], bare),
    ):
        found = [[{s["label"]: s["score"] for s in each["scores"]}[label] for label in labels] for each in results]
        np.testing.assert_allclose(found, values, atol=1e-5)
    assert [each["masked_neurons"] for each in answer["results"]] == [32] * 3
