"""Loads models and corpora, in this process or on a Ray cluster. Importing it loads torch."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from app.serving.inputs import CorpusChoice, OnProgress, RayChoice
from app.settings import ModelSettings
from workers.corpora.corpus import Corpus
from workers.corpora.loading import load_corpus
from workers.corpora.rows import Table
from workers.corpora.sources import load_label_map
from workers.models.loading import LoadedModel, load_model, use_threads

if TYPE_CHECKING:
    from workers.cluster.model_pool import ModelPool


def load(model: ModelSettings) -> LoadedModel:
    """Load a model.

    Raises:
        ModelError: the checkpoint cannot be loaded.
    """
    use_threads(model.threads)
    return load_model(**model.load_arguments())


def load_on_thread(model: ModelSettings) -> LoadedModel:
    """Load a model on a thread that then ends, and with it the OpenMP team of its forward passes.

    A second team beside the engine's own has more threads than cores, and OpenMP then lets them sleep between any two
    operations: a short text took 7 ms instead of 5.
    """
    with ThreadPoolExecutor(1, "loader") as loader:
        return loader.submit(load, model).result()


def read_corpus(choice: CorpusChoice, labels: tuple[str, ...], table: Table | None = None) -> Corpus:
    """Read a corpus for a model with these labels.

    Args:
        table: the data of `choice.source`, if they are open already.

    Raises:
        CorpusError: the texts cannot be read or do not fit the labels.
    """
    label_map = load_label_map(choice.label_map) if choice.label_map else None
    return load_corpus(**{**asdict(choice), "label_map": label_map}, labels=labels, table=table)


def read_corpus_on_cluster(choice: CorpusChoice, labels: tuple[str, ...]) -> Corpus:
    """Read a corpus of files through Ray Data; a data set of the hub is read in this process."""
    from workers.cluster.corpus_files import RayFileTable, is_file_source

    files = choice.source is not None and is_file_source(choice.source)
    return read_corpus(choice, labels, RayFileTable.open(choice.source or "") if files else None)


@contextmanager
def model_pool(
    model: ModelSettings, cluster: RayChoice, on_progress: OnProgress, *corpora: CorpusChoice | None
) -> Iterator["ModelPool"]:
    """Copies of a model on a cluster. Only this imports Ray.

    Args:
        corpora: texts that the caller will read; their files are checked before a cluster is started.

    Raises:
        ClusterError, ModelError: see `workers.cluster.model_pool`.
        CorpusError: files are missing.
    """
    from workers.cluster.connection import PRIVATE, connected
    from workers.cluster.corpus_files import is_file_source
    from workers.cluster.model_pool import ModelPool, PoolLayout
    from workers.corpora.files import files_of

    for each in corpora:
        if each is not None and each.source is not None and is_file_source(each.source):
            files_of(each.source)
    on_progress("starting a cluster" if cluster.address == PRIVATE else "joining the cluster", 0, 0)
    # Ray prints messages about dead processes on stdout, which is for a command's result
    with redirect_stdout(io.StringIO()), connected(cluster.address, (cluster.actors or 1) * (model.threads or 1)):
        layout = PoolLayout.of(cluster.actors, model.threads, model.device)
        arguments = model.load_arguments()
        arguments["device"] = "cuda" if layout.gpu else "cpu" if model.device == "auto" else model.device
        source = arguments.pop("source")
        local = Path(source).expanduser()
        with ModelPool(str(local.absolute()) if local.is_dir() else source, arguments, layout) as pool:
            on_progress(f"loading the model ({layout})", 0, 0)
            yield pool
