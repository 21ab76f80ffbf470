"""The demo's claim, on the demo's own model: erasing by range takes the target and spares the others."""

from pathlib import Path

import pytest
import redis

from range_store.store import RangeStore
from workers.demo.demo import Demo, prepare
from workers.demo.minilm import DemoError, minilm_directory
from workers.evaluation.measures import Row


def mean(demo: Demo, method: str) -> Row:
    (row,) = [row for row in demo.evaluation.rows if row.target == "mean" and row.method == method]
    assert row.top_fraction == 1.0
    return row


def test_the_classifier_learned_its_concepts(made: tuple[Path, Demo]) -> None:
    assert made[1].accuracy >= 0.85


def test_range_masking_takes_the_target_and_spares_the_others(made: tuple[Path, Demo]) -> None:
    row = mean(made[1], "range")
    assert row.delta_acc <= -0.4
    assert row.delta_cacc >= -0.1


def test_neuron_masking_takes_the_others_down_too(made: tuple[Path, Demo]) -> None:
    assert mean(made[1], "neuron").delta_cacc <= -0.3


def test_the_second_start_trains_and_fits_nothing(made: tuple[Path, Demo], redis_client: redis.Redis) -> None:
    directory, first = made
    done: list[str] = []
    again = prepare(directory, RangeStore(redis_client, "demo-test"), lambda what, *now: done.append(what))
    assert set(done) == {"measuring on held-out sentences"}
    assert again.range_set == first.range_set
    assert again.evaluation.rows == first.evaluation.rows


def test_weights_that_are_not_the_known_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (minilm_directory() / "model.safetensors").is_file()
    monkeypatch.setattr("workers.demo.minilm.SHA256", "0" * 64)
    with pytest.raises(DemoError, match="sha256"):
        minilm_directory()
