"""FitResult statistics equal a whole-data reference, and an interrupted fit resumes to the same bits."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from range_store.domain.erasure import Erasure
from range_store.domain.plan import resolve
from range_store.domain.rankings import saliency
from range_store.errors import InvalidErasure
from tests.processes import Running
from tests.workers.checkpoints import LABELS, save_tiny
from tests.workers.masking import edits_of
from tests.workers.texts import labelled_texts, write_jsonl
from workers.corpora.corpus import Corpus
from workers.corpora.errors import CorpusError
from workers.corpora.loading import load_corpus
from workers.fitting.fit import MAX_ROWS, FitResult, fit
from workers.fitting.histograms import edges_from
from workers.fitting.progress import Progress
from workers.models.families import FAMILIES
from workers.models.loading import LoadedModel, load_model

Tiny = Callable[[str], LoadedModel]
ROWS = 1024 + 150
"""One whole chunk and a part of another."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = labelled_texts(ROWS - 1, seed=5)
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", [*rows, ("it rained all day", "Weather")])


@pytest.fixture(scope="module")
def corpus(path: Path) -> Corpus:
    return load_corpus(str(path), labels=LABELS)


@pytest.mark.parametrize(("family", "rows"), [("bert", ROWS), ("gpt2", 150)])
def test_statistics_equal_the_whole_data_reference(tiny: Tiny, family: str, rows: int, path: Path) -> None:
    model = tiny(family)
    corpus = load_corpus(str(path), labels=LABELS, max_rows=rows)
    fitted = fit(model, corpus, layers="all", bins=32, batch_tokens=512)
    texts = [pair for chunk in corpus.chunks() for pair in zip(chunk.texts, chunk.concepts, strict=True)]
    concepts = np.array([concept for _, concept in texts])
    encoded = model.tokens.encode([text for text, _ in texts])
    lengths = np.array([len(text.ids) for text in encoded])
    states = {layer: np.empty((len(texts), model.identity.hidden_size)) for layer in range(3)}
    for length in np.unique(lengths):  # texts of one length make a batch without padding
        same = np.flatnonzero(lengths == length)
        batch = replace(model.tokens.batch([encoded[row] for row in same]), packing=None)
        for layer, state in model.steered.record(batch, [0, 1, 2])[1].items():
            states[layer][same] = state.double().numpy()
    assert fitted.range_set.concepts == corpus.concepts
    for layer in range(3):
        serve, inspect = fitted.range_set.layers[layer], fitted.inspect[layer]
        for row, concept in enumerate(fitted.range_set.concepts):
            own = states[layer][concepts == concept]
            assert fitted.range_set.counts[row] == len(own)
            # batched and single passes differ by float32 rounding only
            assert serve.mean[row] == pytest.approx(own.mean(axis=0), abs=1e-5)
            assert serve.std[row] == pytest.approx(own.std(axis=0), abs=1e-5)
            assert inspect.mean_abs[row] == pytest.approx(np.abs(own).mean(axis=0), abs=1e-5)
            deviation = own - own.mean(axis=0)
            assert inspect.m3[row] == pytest.approx((deviation**3).mean(axis=0), abs=2e-4)
            assert inspect.m4[row] == pytest.approx((deviation**4).mean(axis=0), abs=2e-3)
            assert inspect.histogram[row].sum(axis=1).tolist() == [len(own)] * 32
        for ranking, values in serve.saliency.items():
            again = saliency(ranking, fitted.range_set.counts, serve.mean, serve.std, inspect.mean_abs)
            assert np.array_equal(values, again)


def test_provenance_records_model_settings_and_corpus(tiny: Tiny, corpus: Corpus) -> None:
    model = tiny("bert")
    provenance = fit(model, corpus, layers=(-1, 0), rankings=("max",), bins=16).range_set.provenance
    assert provenance.model == model.identity
    assert (provenance.settings.layers, provenance.settings.rankings) == ((0, 2), ("max",))
    assert (provenance.corpus.rows, provenance.corpus.sha256) == (ROWS, corpus.sha256)
    assert provenance.corpus.counts["Weather"] == 1
    assert set(provenance.versions) == {"neuronlens", "torch", "transformers", "numpy"}
    with pytest.raises(InvalidErasure, match="layer 3"):
        fit(model, corpus, layers=(3,))


def test_corpus_larger_than_a_bin_can_count_is_rejected(
    tiny: Tiny, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert")
    counts = fit(model, corpus).inspect[model.identity.n_layers - 1].histogram
    assert np.iinfo(counts.dtype).max == MAX_ROWS
    monkeypatch.setattr("workers.fitting.fit.MAX_ROWS", len(corpus) - 1)
    with pytest.raises(CorpusError, match=f"--max-rows {len(corpus) - 1} or fewer"):
        fit(model, corpus)


def test_order_of_the_rows_leaves_few_values_beyond_the_edges(tiny: Tiny, tmp_path: Path) -> None:
    """The first chunk of this corpus holds the values of one class only."""
    rows = [("it rained all day", "World")] * 1030 + [(text, "Sports") for text, _ in labelled_texts(170, seed=5)]
    corpus = load_corpus(str(write_jsonl(tmp_path / "sorted.jsonl", rows)), labels=LABELS)
    fitted = fit(tiny("bert"), corpus, bins=16)
    assert fitted.range_set.provenance.settings.edge_rows == 128
    histogram = fitted.inspect[2].histogram
    beyond = (histogram[..., 0] + histogram[..., -1]).sum(axis=1) / histogram.sum(axis=(1, 2))
    assert (beyond < 0.05).all(), beyond


def test_first_chunk_sets_the_edges_where_no_text_of_the_sample_counts(
    tiny: Tiny, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert")
    nothing = np.zeros((0, 1, model.identity.hidden_size), dtype=np.float32)
    monkeypatch.setattr("workers.fitting.fit.record_sample", lambda *_: nothing)
    inspect = fit(model, corpus, bins=16).inspect[2]
    first = next(iter(corpus.chunks()))
    values = np.concatenate(
        [
            model.steered.record(model.tokens.batch(model.tokens.encode(first.texts[at : at + 64])), [2])[1][2].numpy()
            for at in range(0, len(first.texts), 64)
        ]
    )
    expected = edges_from(values, 16)
    np.testing.assert_allclose(inspect.edges, expected, atol=1e-4)


def test_one_chunk_sets_its_own_edges(tiny: Tiny, path: Path) -> None:
    """So that range sets of small corpora keep their ids."""
    corpus = load_corpus(str(path), labels=LABELS, max_rows=100)
    settings = fit(tiny("bert"), corpus, bins=16).range_set.provenance.settings
    assert settings.edge_rows is None
    assert "edge_rows" not in settings.model_dump(mode="json")
    assert "edge_rows" not in settings.model_dump_json()


def test_id_depends_on_the_settings_only(tiny: Tiny, corpus: Corpus) -> None:
    model = tiny("bert")
    first = fit(model, corpus, bins=16).range_set.id
    assert fit(model, corpus, bins=16).range_set.id == first
    assert fit(model, corpus, bins=17).range_set.id != first


class Stopped(Exception):
    """Raised by a progress callback."""


def test_stopped_fit_resumes_where_it_stopped(tiny: Tiny, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    whole = fit(model, corpus, layers="all", bins=16)
    progress: list[Progress] = []

    def stop_in_the_second_chunk(now: Progress) -> None:
        if now.done > 1024:
            raise Stopped

    with pytest.raises(Stopped):
        fit(
            model,
            corpus,
            layers="all",
            bins=16,
            checkpoint_dir=tmp_path,
            checkpoint_seconds=0,
            progress=stop_in_the_second_chunk,
        )
    assert len(list(tmp_path.iterdir())) == 1
    resumed = fit(model, corpus, layers="all", bins=16, checkpoint_dir=tmp_path, progress=progress.append)
    assert progress[0].resumed > 0
    assert progress[-1].done == ROWS
    assert resumed.range_set.id == whole.range_set.id
    resumed.discard_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_is_ignored(tiny: Tiny, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    whole = fit(model, corpus, bins=16, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    (checkpoint,) = tmp_path.iterdir()
    for content in (b"", checkpoint.read_bytes()[:1000], b"\0" * 5000):
        checkpoint.write_bytes(content)
        assert fit(model, corpus, bins=16, checkpoint_dir=tmp_path).range_set.id == whole.range_set.id


def test_checkpoint_of_other_settings_is_ignored(tiny: Tiny, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny("bert")
    fit(model, corpus, bins=16, checkpoint_dir=tmp_path, checkpoint_seconds=0)
    progress: list[Progress] = []
    fit(model, corpus, bins=18, checkpoint_dir=tmp_path, progress=progress.append)
    assert progress[0].resumed == 0


DIES_IN_THE_SECOND_CHUNK = """
import os, signal, torch
from pathlib import Path
from workers.corpora.loading import load_corpus
from workers.fitting.fit import fit
from workers.models.loading import load_model

def die_in_the_second_chunk(now):
    if now.done > 1024:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
model = load_model({source!r}, device="cpu")
fit(model, load_corpus({data!r}, labels=model.identity.labels), layers="all", bins=16,
    checkpoint_dir=Path({checkpoints!r}), checkpoint_seconds=0, progress=die_in_the_second_chunk)
"""


def test_killed_fit_resumes_to_the_same_bits(path: Path, tmp_path: Path) -> None:
    source = str(save_tiny("bert", tmp_path / "model"))
    checkpoints = tmp_path / "checkpoints"
    code = DIES_IN_THE_SECOND_CHUNK.format(source=source, data=str(path), checkpoints=str(checkpoints))
    killed = Running([], code=code)
    assert killed.end() == -signal.SIGKILL, killed.stderr
    model = load_model(source, device="cpu")
    corpus = load_corpus(str(path), labels=LABELS)
    progress: list[Progress] = []
    resumed = fit(model, corpus, layers="all", bins=16, checkpoint_dir=checkpoints, progress=progress.append)
    assert progress[0].resumed >= 1024
    assert bits(resumed) == bits(fit(model, corpus, layers="all", bins=16))


def bits(fitted: FitResult) -> tuple[str, list[bytes]]:
    arrays = [array.tobytes() for layer in fitted.inspect.values() for array in vars(layer).values()]
    return fitted.range_set.id, arrays


def test_bfloat16_states_are_not_converted_before_fitting(path: Path, tmp_path: Path) -> None:
    model = load_model(str(save_tiny("bert", tmp_path / "model")), device="cpu", dtype="bfloat16")
    corpus = load_corpus(str(path), labels=LABELS, max_rows=40)
    fitted = fit(model, corpus, bins=16)
    assert fitted.range_set.provenance.settings.dtype == "bfloat16"
    extremes = torch.from_numpy(fitted.inspect[2].maximum)
    assert torch.equal(extremes.to(torch.bfloat16).double(), extremes), "recorded values are bfloat16 values"


def test_unfinished_chunk_is_resumed(tiny: Tiny, corpus: Corpus, tmp_path: Path) -> None:
    """A chunk of long texts may take minutes, so its finished batches are saved too."""
    model = tiny("bert")
    seen: list[int] = []

    def stop_after_31_batches(now: Progress) -> None:
        seen.append(now.done)
        if len(seen) > 30:
            raise Stopped

    with pytest.raises(Stopped):
        fit(
            model,
            corpus,
            bins=16,
            batch_tokens=500,
            checkpoint_dir=tmp_path,
            checkpoint_seconds=0,
            progress=stop_after_31_batches,
        )
    assert seen[-1] < 1024
    progress: list[Progress] = []
    resumed = fit(model, corpus, bins=16, batch_tokens=500, checkpoint_dir=tmp_path, progress=progress.append)
    assert 0 < progress[0].resumed < 1024
    assert bits(resumed) == bits(fit(model, corpus, bins=16, batch_tokens=500))


def test_correct_only_fits_the_texts_that_the_model_gets_right(tiny: Tiny, path: Path, tmp_path: Path) -> None:
    model = tiny("bert")
    corpus = load_corpus(str(write_jsonl(tmp_path / "labels.jsonl", labelled_texts(200, seed=6))), labels=LABELS)
    states: dict[str, list[torch.Tensor]] = {}
    for chunk in corpus.chunks():
        for text, concept in zip(chunk.texts, chunk.concepts, strict=True):
            logits, recorded = model.steered.record(model.tokens.batch(model.tokens.encode([text])), [2])
            if model.identity.labels[int(logits.argmax())] == concept:
                states.setdefault(concept, []).append(recorded[2][0])
    assert len(states) > 1, "the random model gets the texts of at most one concept right"
    fitted = fit(model, corpus, correct_only=True, bins=16)
    provenance = fitted.range_set.provenance
    assert provenance.settings.texts == "correct"
    assert provenance.corpus.counts == {
        concept: len(states[concept]) for concept in corpus.concepts if concept in states
    }
    for row, concept in enumerate(fitted.range_set.concepts):
        expected = torch.stack(states[concept]).double().mean(dim=0).numpy()
        np.testing.assert_allclose(fitted.range_set.layers[2].mean[row], expected, atol=1e-5)
    capped = fit(model, corpus, correct_only=True, rows_per_class=3, bins=16).range_set
    assert set(capped.provenance.corpus.counts.values()) <= {1, 2, 3}
    first = torch.stack(states[capped.concepts[0]][:3]).double().mean(dim=0).numpy()
    np.testing.assert_allclose(capped.layers[2].mean[0], first, atol=1e-5)


def test_mean_over_tokens_can_be_recorded(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("gpt2")
    corpus = load_corpus(str(write_jsonl(tmp_path / "some.jsonl", labelled_texts(30, seed=7))), labels=LABELS)
    outputs: list[torch.Tensor] = []
    handle = model.steered.blocks[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    states = []
    for chunk in corpus.chunks():
        for text in chunk.texts:
            alone = model.tokens.batch(model.tokens.encode([text]))
            model.steered.logits(replace(alone, packing=None))
            states.append(outputs[-1][0].mean(dim=0).double())
    handle.remove()
    found = fit(model, corpus, layers=(1,), position="mean", bins=16).range_set
    weights = found.counts / found.counts.sum()
    pooled = (found.layers[1].mean * weights[:, None]).sum(axis=0)
    np.testing.assert_allclose(pooled, torch.stack(states).mean(dim=0).numpy(), atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mlp_outputs_can_be_recorded_and_masked(tiny: Tiny, family: str, path: Path) -> None:
    model = tiny(family)
    corpus = load_corpus(str(path), labels=LABELS, max_rows=60)
    fitted = fit(model, corpus, layers=(0, 2), site="mlp_output", bins=16).range_set
    assert not np.allclose(fitted.layers[0].mean, fit(model, corpus, layers=(0,), bins=16).range_set.layers[0].mean)
    plan = resolve(fitted, [Erasure(concept="Sports", method="neuron", top_fraction=1.0, layers=(0,))])
    assert plan.site == "mlp_output"
    batch = model.tokens.batch(model.tokens.encode(["a goal", "a long night at the bank"]))
    batch = replace(batch, packing=None)
    table = edits_of([plan], 2)
    trunk = model.steered.trunk(batch, 0, whole=False)
    masked = model.steered.steer(batch, trunk, torch.arange(2), table)
    place = model.steered.blocks[0].get_submodule(FAMILIES[family].mlp)
    real = batch.mask.unsqueeze(-1)
    handle = place.register_forward_hook(lambda module, args, output: torch.where(real, 0.0, output))
    expected = model.steered.logits(batch)
    handle.remove()
    torch.testing.assert_close(masked, expected, atol=1e-6, rtol=0)
    assert (masked - model.steered.logits(batch)).abs().max() > 1e-3


def test_texts_without_tokens_are_left_out_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("gpt2")
    rows = [*labelled_texts(20, seed=5), ("", "Sports"), ("odd \ufffd text", "World")]
    corpus = load_corpus(str(write_jsonl(tmp_path / "some.jsonl", rows)), labels=LABELS)
    found = fit(model, corpus, bins=16).range_set.provenance.corpus
    assert (found.rows, found.empty, found.odd) == (22, 1, 1)
    assert sum(found.counts.values()) == 21


def test_a_fit_warns_of_empty_texts(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*labelled_texts(20, seed=5), ("  ", "World")]
    fit(tiny("bert"), load_corpus(str(write_jsonl(tmp_path / "few.jsonl", rows)), labels=LABELS))
    assert "few.jsonl: 1 of 21 texts are empty" in caplog.text
