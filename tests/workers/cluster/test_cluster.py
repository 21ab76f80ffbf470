"""Fits and evaluations on a cluster give the numbers of one process, also when actors or nodes are lost.

All tests of this file share a cluster of two simulated nodes and a pool of three actors; the last one removes a node.
"""

import csv
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from app.cli import run
from tests.range_store.waiting import until
from tests.workers.checkpoints import LABELS, save_tiny
from tests.workers.texts import labelled_texts, write_jsonl
from workers.cluster import model_pool
from workers.cluster.connection import KEEP_WORKERS, connected
from workers.cluster.corpus_files import RayFileTable
from workers.cluster.errors import ClusterError
from workers.cluster.evaluation import measure_on
from workers.cluster.fitting import fit_on
from workers.cluster.model_pool import ActorFunction, ModelPool, PoolLayout
from workers.corpora.corpus import Corpus
from workers.corpora.errors import CorpusError
from workers.corpora.loading import load_corpus
from workers.evaluation.evaluate import EvaluationOptions, evaluate, evaluate_by
from workers.evaluation.settings import EvaluationSettings
from workers.fitting.fit import FitOptions, FitResult, fit
from workers.fitting.progress import Progress
from workers.models.errors import CheckpointError
from workers.models.loading import LoadedModel, load_model

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[3]
ROWS = labelled_texts(7 * 1024 + 300, seed=8)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes on this machine: the head with one CPU, another with two CPUs."""
    place = tempfile.mkdtemp(prefix="nlr-", dir="/tmp")
    patched = pytest.MonkeyPatch()
    patched.setenv("PYTHONPATH", str(ROOT))  # where actors find the modules of the tests
    patched.setenv("RAY_TMPDIR", place)  # where "auto" finds this cluster
    Path(place, "ray").mkdir()
    sizes: dict[str, Any] = {"object_store_memory": 150 << 20, "include_dashboard": False}
    started = Cluster(True, head_node_args={"num_cpus": 1, "_system_config": KEEP_WORKERS, **sizes})
    started.add_node(num_cpus=2, **sizes)
    try:
        with connected(started.address):
            yield started
    finally:
        started.shutdown()
        shutil.rmtree(place, ignore_errors=True)
        patched.undo()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("bert", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def pool(cluster: Cluster, source: str) -> Iterator[ModelPool]:
    with ModelPool(source, {"device": "cpu"}, PoolLayout(3, 1, gpu=False)) as models:
        yield models


@pytest.fixture(scope="module")
def model(source: str) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(source, device="cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", ROWS)


@pytest.fixture(scope="module")
def corpus(path: Path) -> Corpus:
    return load_corpus(str(path), labels=LABELS)


CHOICES: FitOptions = {"layers": "all", "bins": 32, "batch_tokens": 2048}


@pytest.fixture(scope="module")
def local_fit(model: LoadedModel, corpus: Corpus) -> FitResult:
    """The fit of one process."""
    return fit(model, corpus, **CHOICES)


def numbers(fitted: FitResult) -> dict[str, bytes]:
    """The bytes of every array of a fit, by name."""
    found = {}
    for layer, serve in fitted.range_set.layers.items():
        found |= {f"{layer}.saliency.{name}": values.tobytes() for name, values in serve.saliency.items()}
        found |= {f"{layer}.mean": serve.mean.tobytes(), f"{layer}.std": serve.std.tobytes()}
        found |= {f"{layer}.{name}": array.tobytes() for name, array in vars(fitted.inspect[layer]).items()}
    assert len(found) > 9
    return found


def on_cluster(source: object, **choices: Any) -> Corpus:
    return load_corpus(str(source), table=RayFileTable.open(str(source)), labels=LABELS, **choices)


def five_files(directory: Path, rows: Sequence[tuple[str, str]]) -> Path:
    directory.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(rows)), [10, 1500, 1501, 5000])):
        write_jsonl(directory / f"part-{number}.jsonl", [rows[int(row)] for row in part])
    return directory


def parquet_file(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    table = pa.table({"id": range(len(rows)), "text": [row[0] for row in rows], "label": [row[1] for row in rows]})
    pa.parquet.write_table(table, path, row_group_size=700)
    return path


def csv_file(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    return path


WRITERS: dict[str, Callable[[Path, Sequence[tuple[str, str]]], Path]] = {
    "five": five_files,
    "train.parquet": parquet_file,
    "train.csv": csv_file,
}


def test_model_that_does_not_load_is_an_error(cluster: Cluster, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with (
        ModelPool(missing, {"device": "cpu"}, PoolLayout(1, 1, gpu=False)) as pool,
        pytest.raises(CheckpointError, match=f"^no such directory: {missing}$"),
    ):
        assert pool.model_info


def test_interrupted_command_ends_its_cluster_and_can_be_resumed(
    cluster: Cluster, source: str, local_fit: FitResult, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted on a private cluster, resumed on that of this file. Only the result is on stdout."""
    command = ["fit", "--model", source, "--data", str(path), "--layer", "all", "--bins", "32", "--threads", "1"]
    command += ["--batch-tokens", "2048", "--data-dir", str(tmp_path), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", *command, "--ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("fitting"):
            break
    own = psutil.Process(process.pid).children(recursive=True)
    places = set(re.findall(r"/tmp/neuronlens-\w{8}", " ".join(word for each in own for word in each.cmdline())))
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + rest
    assert out == ""
    assert "interrupted: the same command resumes" in rest
    assert "Traceback" not in rest
    assert own, "the processes of the cluster"
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in own), 60)
    assert [Path(place).exists() for place in places] == [False]
    assert list((tmp_path / "fits").iterdir()), "a checkpoint"
    capsys.readouterr()
    assert run([*command, "--ray", "auto", "--actors", "1"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["id"] == local_fit.range_set.id


def test_evaluate_writes_the_results_of_one_process(
    cluster: Cluster, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "learned.jsonl", ROWS[:600])
    write_jsonl(tmp_path / "test.jsonl", ROWS[600:900])
    command = ["evaluate", "--model", source, "--data", str(tmp_path / "learned.jsonl"), "--top-fraction", "0.3,1.0"]
    command += ["--test-data", str(tmp_path / "test.jsonl"), "--bins", "32", "--threads", "1", "--resamples", "50"]
    results = []
    for place, more in (("here", []), ("there", ["--ray", "auto", "--actors", "1"])):
        assert run([*command, "--out", str(tmp_path / place), "--json", *more]) == 0
        assert json.loads(capsys.readouterr().out)
        results.append([(tmp_path / place / name).read_text() for name in ("results.json", "results.csv")])
        assert not list((tmp_path / place).glob(".measuring-*"))
    assert results[0] == results[1]
    assert run([*command, "--ray", "auto", "--perplexity"]) == 2


@pytest.mark.parametrize("written", WRITERS)
def test_fit_is_that_of_one_process_for_every_file_format(
    pool: ModelPool, local_fit: FitResult, corpus: Corpus, written: str, tmp_path: Path
) -> None:
    found = on_cluster(WRITERS[written](tmp_path / written, ROWS))
    assert (found.sha256, found.counts, found.odd, len(found)) == (corpus.sha256, corpus.counts, 0, len(ROWS))
    progress: list[Progress] = []
    fitted = fit_on(pool, found, progress=progress.append, **CHOICES)
    assert numbers(fitted) == numbers(local_fit)
    assert progress[-1].done == progress[-1].total == len(ROWS)
    own, other = fitted.range_set.provenance, local_fit.range_set.provenance
    assert own.corpus.model_copy(update={"name": other.corpus.name}) == other.corpus
    assert (own.model, own.settings, own.versions) == (other.model, other.settings, other.versions)


def test_layout_without_a_suitable_node_needs_actors_and_threads(cluster: Cluster) -> None:
    with pytest.raises(
        ClusterError,
        match=r"^no node of the cluster has a GPU: use --device cpu; to wait for nodes, pass",
    ):
        PoolLayout.of(None, 1, "cuda")
    assert PoolLayout.of(2, 1, "cuda") == PoolLayout(2, 1, gpu=True)
    assert PoolLayout.of(2, None, "auto") == PoolLayout(2, 1, gpu=False)


def test_pool_that_waits_for_cpus_logs_what_is_free(
    pool: ModelPool, source: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    until(lambda: ray.available_resources().get("CPU", 0) == 0, 120)
    monkeypatch.setattr(model_pool, "WARN_SECONDS", 0.1)

    def logged() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.name == model_pool.logger.name]

    def stop_once_logged() -> None:
        if logged():
            raise Stopped

    waiting = ModelPool(source, {"device": "cpu"}, PoolLayout(1, 2, gpu=False))
    during_waits(waiting, monkeypatch, stop_once_logged)
    with waiting, pytest.raises(Stopped):
        assert waiting.model_info
    expected = "no model is loaded: the pool needs 1 × 2 CPUs, 0 CPUs and 0 GPUs are free on all nodes together"
    assert logged() == [expected]


def test_caps_probe_and_correct_only_give_the_fit_of_one_process(
    pool: ModelPool, model: LoadedModel, corpus: Corpus, path: Path
) -> None:
    choices: FitOptions = {**CHOICES, "rankings": ("max", "probe"), "correct_only": True, "rows_per_class": 500}
    fitted = fit_on(pool, on_cluster(path), **choices)
    assert max(fitted.range_set.counts) == 500, "the cap takes effect"
    assert fitted.range_set.id == fit(model, corpus, **choices).range_set.id


def test_sampling_draws_the_rows_that_one_process_draws(cluster: Cluster, path: Path, tmp_path: Path) -> None:
    several = five_files(tmp_path / "several", ROWS)
    for choices in ({"max_rows": 1500, "seed": 3}, {"rows_per_class": 300}, {"max_rows": 2000, "rows_per_class": 200}):
        own, other = on_cluster(several, **choices), load_corpus(str(path), labels=LABELS, **choices)
        assert (own.sha256, own.selection, len(own)) == (other.sha256, other.selection, len(other))
        parts, others = own.split_off(0.1, 5), other.split_off(0.1, 5)
        assert [part.sha256 for part in parts] == [part.sha256 for part in others]


def test_corpus_is_read_from_a_url(cluster: Cluster, corpus: Corpus, path: Path) -> None:
    handler = functools.partial(_Quiet, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = on_cluster(f"http://127.0.0.1:{server.server_address[1]}/{path.name}")
        server.shutdown()
    assert (found.name, found.sha256) == (corpus.name, corpus.sha256)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *said: Any) -> None:
        pass


def test_error_names_the_file_and_row(cluster: Cluster, tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"part-{number}.jsonl", ROWS[:50])
    with pytest.raises(CorpusError, match=r"no such file: .*other"):
        on_cluster(tmp_path / "other")
    bad = tmp_path / "part-1.jsonl"
    for line, message in (
        ({"label": "World"}, "part-1.jsonl: row 51 has no text"),
        ({"text": None, "label": "World"}, "part-1.jsonl: row 51 has no text"),
        ({"text": "a goal", "label": 7}, "part-1.jsonl: row 51 has label 7, but class numbers go from 0"),
        ({"text": "a goal", "label": None}, "part-1.jsonl: row 51 has no label"),
        ("{nothing", "cannot read part-1.jsonl: "),
    ):
        rows = ROWS[:50] if not isinstance(line, dict) or not isinstance(line["label"], int) else []
        write_jsonl(bad, rows)
        with bad.open("a") as stream:
            stream.write(line if isinstance(line, str) else json.dumps(line) + "\n")
        with pytest.raises(CorpusError, match=message.replace("51", str(len(rows) + 1))):
            on_cluster(tmp_path)


class Stopped(Exception):
    """Raised by a callback of these tests."""


def stop_after_2048_rows(now: Progress) -> None:
    if now.done >= 2048:
        raise Stopped


def test_stopped_fit_resumes_on_the_cluster_and_in_one_process(
    pool: ModelPool, model: LoadedModel, local_fit: FitResult, corpus: Corpus, path: Path, tmp_path: Path
) -> None:
    own = on_cluster(path)
    with pytest.raises(Stopped):
        fit_on(pool, own, checkpoint_dir=tmp_path, progress=stop_after_2048_rows, **CHOICES)
    (checkpoint,) = tmp_path.iterdir()
    kept = checkpoint.read_bytes()
    progress: list[Progress] = []
    resumed = fit_on(pool, own, checkpoint_dir=tmp_path, progress=progress.append, **CHOICES)
    assert 2048 <= progress[0].resumed < len(ROWS)
    assert resumed.range_set.id == local_fit.range_set.id
    assert numbers(resumed) == numbers(local_fit)
    checkpoint.write_bytes(kept)
    progress.clear()
    resumed = fit(model, corpus, checkpoint_dir=tmp_path, progress=progress.append, **CHOICES)
    assert progress[0].resumed >= 2048
    assert numbers(resumed) == numbers(local_fit)


def during_waits(pool: ModelPool, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Let the pool call `action` whenever it waits."""
    wait = pool._wait

    def acting(*arguments: Any) -> Any:
        action()
        return wait(*arguments)

    monkeypatch.setattr(pool, "_wait", acting)


class _Victim:
    """An actor that is stopped at once, so that it finishes no work; a call kills it if it has been given some."""

    def __init__(self, pool: ModelPool) -> None:
        until(lambda: all_ready(pool), 300)
        self._actor = pool._actors[-1]
        assert self._actor.info
        self.pid = self._actor.info.pid
        os.kill(self.pid, signal.SIGSTOP)

    def __call__(self) -> None:
        if self._actor.tasks:
            with suppress(ProcessLookupError):  # it has ended already
                os.kill(self.pid, signal.SIGKILL)


def all_ready(pool: ModelPool) -> bool:
    """Whether all actors answer; the work that this sends makes the pool replace those that have died."""
    done = list(pool.map(ActorFunction[int, int].of(_Squares, 0), iter(range(30))))
    return bool(done) and all(actor.loading is None for actor in pool._actors)


def test_killed_actor_does_not_change_the_fit(
    pool: ModelPool,
    local_fit: FitResult,
    path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = on_cluster(path)
    victim = _Victim(pool)
    during_waits(pool, monkeypatch, victim)
    fitted = fit_on(pool, own, **CHOICES)
    assert f"an actor was lost, process {victim.pid} of node" in caplog.text
    assert fitted.range_set.id == local_fit.range_set.id
    assert numbers(fitted) == numbers(local_fit)


def test_evaluation_is_that_of_one_process_after_a_kill_and_a_resume(
    pool: ModelPool,
    model: LoadedModel,
    local_fit: FitResult,
    path: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = EvaluationSettings(top_fractions=(0.3, 1.0), positions=("all", "read"), resamples=20, batch_tokens=2048)
    corpus = load_corpus(str(path), labels=LABELS, max_rows=5000)
    expected = repr(evaluate(model, local_fit.range_set, corpus, settings).rows)
    seen: list[Progress] = []

    def on_pool(**options: Unpack[EvaluationOptions]) -> str:
        by = functools.partial(measure_on, pool)
        drawn = on_cluster(path, max_rows=5000)
        return repr(evaluate_by(by, pool.model_info.identity, local_fit.range_set, drawn, settings, **options).rows)

    victim = _Victim(pool)
    during_waits(pool, monkeypatch, victim)
    assert on_pool(progress=seen.append) == expected
    monkeypatch.undo()
    assert f"an actor was lost, process {victim.pid} of node" in caplog.text
    assert seen[-1].done == 5000
    with pytest.raises(Stopped):
        on_pool(checkpoint_dir=tmp_path, progress=stop_after_2048_rows)
    (checkpoint,) = tmp_path.iterdir()
    kept = checkpoint.read_bytes()
    seen.clear()
    assert on_pool(checkpoint_dir=tmp_path, progress=seen.append) == expected
    assert 2048 <= seen[0].resumed < 5000
    checkpoint.write_bytes(kept)
    assert repr(evaluate(model, local_fit.range_set, corpus, settings, checkpoint_dir=tmp_path).rows) == expected


def test_pool_gives_results_in_order_and_takes_few_tasks_ahead(pool: ModelPool) -> None:
    taken: list[int] = []

    def numbers_to_square() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    ahead = []
    given = []
    for number, square, _ in pool.map(ActorFunction[int, int].of(_Squares, 3), numbers_to_square()):
        assert square == 3 + number**2
        given.append(number)
        ahead.append(len(taken) - len(given))
    assert given == list(range(200))
    assert max(ahead) <= (model_pool.PER_ACTOR + 1) * 3


class _Squares:
    """Squares numbers; -1 raises an error, -2 ends the process."""

    def __init__(self, model: LoadedModel, plus: int) -> None:
        self._plus = plus

    def __call__(self, number: int) -> int:
        if number == -1:
            raise RuntimeError("not this one\nand more")
        if number == -2:
            os._exit(1)
        return number**2 + self._plus


def test_abandoned_work_leaves_every_actor_free(pool: ModelPool) -> None:
    job = ActorFunction[int, int].of(_Squares, 0)
    for results in (pool.map(job, iter(range(100))), pool.map(job, iter([1, -1, 2, 3, 4, 5]))):
        with suppress(ClusterError):
            next(results), next(results)
        results.close()
        assert [actor.tasks for actor in pool._actors] == [0] * 3


def test_error_of_an_actor_is_one_line(pool: ModelPool, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ActorFunction[int, int].of(_Squares, 0)
    with pytest.raises(ClusterError, match=r"^an actor failed: RuntimeError: not this one$"):
        pool.call(job, -1)
    assert pool.call(job, 4) == 16
    with monkeypatch.context() as patched:
        patched.setattr(model_pool, "ATTEMPTS", 1)
        with pytest.raises(ClusterError, match=r"^-2: 1 actors died with this task: "):
            pool.call(job, -2)


def test_removed_node_does_not_change_the_fit(
    pool: ModelPool,
    cluster: Cluster,
    local_fit: FitResult,
    path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed: list[Any] = []
    until(lambda: all_ready(pool), 300)

    def remove_node_once() -> None:
        busy = [actor.info.pid for actor in pool._actors if actor.tasks and actor.info]
        if not removed and len(busy) >= 2:  # the node runs one of them, and is removed before that one finishes
            for pid in busy:
                os.kill(pid, signal.SIGSTOP)
            removed.append(next(node for node in cluster.list_all_nodes() if not node.head))
            cluster.remove_node(removed[0], allow_graceful=False)
            for pid in busy:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    during_waits(pool, monkeypatch, remove_node_once)
    fitted = fit_on(pool, on_cluster(path), **CHOICES)
    assert removed, "two actors had work at the same time"
    assert "an actor was lost" in caplog.text
    until(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 1, 240)
    assert fitted.range_set.id == local_fit.range_set.id
    assert numbers(fitted) == numbers(local_fit)
