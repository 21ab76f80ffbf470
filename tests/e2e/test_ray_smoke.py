"""A fit and a fleet of one replica on a Ray cluster; several nodes and faults are tested in `make test-full`."""

from pathlib import Path

import httpx
import numpy as np

from app.serving.fleet import open_fleet
from app.settings import Settings
from tests.e2e.on_ray import over_http
from tests.servers import LABELS, RunningServer
from tests.workers.texts import labelled_texts, write_jsonl
from workers.cluster.connection import PRIVATE, connected
from workers.cluster.fitting import fit_on
from workers.cluster.model_pool import ModelPool, PoolLayout
from workers.corpora.loading import load_corpus
from workers.fitting.fit import FitOptions, FitResult, fit
from workers.models.loading import LoadedModel

CHOICES: FitOptions = {"layers": (-1,), "bins": 16}
ROWS = [(text, label.replace("SciTech", "Sci/Tech")) for text, label in labelled_texts(60, seed=5)]


def scores(reply: httpx.Response) -> np.ndarray:
    """Shape (texts, labels)."""
    assert reply.status_code == 200, reply.text
    by_label = [{each["label"]: each["score"] for each in text["scores"]} for text in reply.json()["results"]]
    return np.array([[text[label] for label in LABELS] for text in by_label])


def test_ray_cluster_fits_and_serves_as_one_process_does(
    model: LoadedModel, fitted: FitResult, server: RunningServer, tmp_path: Path
) -> None:
    corpus = load_corpus(str(write_jsonl(tmp_path / "train.jsonl", ROWS)), labels=LABELS)
    settings = Settings(
        name="smoke",
        ray=PRIVATE,
        model=model.source,
        threads=1,
        device="cpu",
        redis_url=server.service.settings.redis_url,
        data_dir=tmp_path,
        poll_seconds=0.2,
    )
    with connected(PRIVATE, cpus=1, object_store=100 << 20):
        with ModelPool(model.source, {"device": "cpu"}, PoolLayout(1, 1, gpu=False)) as pool:
            fitted_on_cluster = fit_on(pool, corpus, **CHOICES)
        assert fitted_on_cluster.range_set.id == fit(model, corpus, **CHOICES).range_set.id

        with open_fleet(settings) as services, over_http(services) as fleet:
            store = services[0].store
            store.activate(store.range_sets.publish(fitted.range_set, fitted.inspect))
            asked = {"inputs": [text for text, _ in ROWS[:8]]}
            before = scores(server.http.post("/v1/classify", json=asked))
            erasure = {"params": {"wait": "all", "wait_seconds": 60}, "json": {"top_fraction": 1.0}}
            fleet_change, server_change = (http.put("/v1/erasures/Sports", **erasure) for http in (fleet, server.http))
            assert fleet_change.status_code == server_change.status_code == 200, fleet_change.text
            reply = fleet.post("/v1/classify", json=asked)
            assert reply.json()["erasure"]["generation"] == fleet_change.json()["generation"]
            expected = scores(server.http.post("/v1/classify", json=asked))
            assert np.abs(expected - before).max() > 0.01, "the erasure changes the scores"
            np.testing.assert_allclose(scores(reply), expected, atol=1e-4)
            assert fleet.delete("/v1/erasures/Sports", params={"wait": "all"}).status_code == 200
            np.testing.assert_allclose(scores(fleet.post("/v1/classify", json=asked)), before, atol=1e-4)
