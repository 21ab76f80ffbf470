"""Every protocol reads a head's logits as transformers' own text-classification pipeline does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TextClassificationPipeline

from tests.e2e.dropin.protocols import PROTOCOLS
from tests.servers import LABELS, RunningServer
from tests.workers.checkpoints import save_tiny
from tests.workers.texts import labelled_texts
from workers.models.loading import load_model

TEXTS = [text for text, _ in labelled_texts(6, seed=6)]


@pytest.mark.local
@pytest.mark.parametrize(("labels", "problem_type"), [(LABELS[:1], None), (LABELS[:3], "regression")])
def test_scores_of_a_head_are_those_of_transformers_pipeline(
    start_server: Callable[..., RunningServer], tmp_path: Path, labels: tuple[str, ...], problem_type: str | None
) -> None:
    model = load_model(str(save_tiny("bert", tmp_path, labels=labels, problem_type=problem_type)), device="cpu")
    pipeline = TextClassificationPipeline(model=model.steered.model, tokenizer=model.tokens._tokenizer)
    expected = [
        pytest.approx({each["label"]: each["score"] for each in answer}, abs=1e-5)
        for answer in pipeline(TEXTS, top_k=None)
    ]
    server = start_server(model)
    own = server.classify(TEXTS).raise_for_status().json()["results"]
    assert [{each["label"]: each["score"] for each in result["scores"]} for result in own] == expected
    assert [result["label"] for result in own] == [answer[0]["label"] for answer in pipeline(TEXTS, top_k=None)]
    for protocol in PROTOCOLS.values():
        reply = server.http.post(protocol.path(server.service.name), json=protocol.request(TEXTS))
        assert protocol.scores(reply.raise_for_status().json()) == expected, protocol
