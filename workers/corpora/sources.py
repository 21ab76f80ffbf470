"""Checks of the files, data sets and label maps of a corpus before a model is loaded for it. Without torch."""

import json
from pathlib import Path

from workers.corpora.data_names import without_credentials
from workers.corpora.errors import CorpusError
from workers.corpora.files import files_of, is_hub_dataset, is_saved_dataset
from workers.corpora.paper_datasets import PAPER_DATASETS, PaperDataset

HUB_TIMEOUT = 10.0
"""Seconds that the hub has to say whether it has a data set."""


def check_source(source: str | None) -> None:
    """Raises CorpusError if `source` names files that do not exist or cannot be read in this process."""
    if source is None or is_hub_dataset(source) or is_saved_dataset(source):
        return
    if "://" in source:
        raise CorpusError(
            f"{without_credentials(source)}: addresses are read only with --ray; name files of this machine"
        )
    files_of(source)


def check_on_hub(source: str) -> None:
    """Raises CorpusError if the hub says that it has no such data set. A hub that cannot be reached is no error."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(source, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        raise CorpusError(f"no such file or directory: {source}, nor a data set of that name on the hub") from None
    except Exception:  # any failure to connect: if the hub is needed, reading from it will fail
        return


def paper_dataset(name: str | None) -> PaperDataset | None:
    """One of the paper's data sets by name; None if `name` is None.

    Raises:
        CorpusError: there is none of that name.
    """
    if name is not None and name not in PAPER_DATASETS:
        raise CorpusError(f"unknown data set {name!r}; expected one of: {', '.join(PAPER_DATASETS)}")
    return None if name is None else PAPER_DATASETS[name]


def load_label_map(path: Path) -> dict[str, str]:
    """Read a JSON object that maps labels of the data to labels of the model.

    Raises:
        CorpusError: the file has no such object, or gives a label two names.
    """
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=tuple)
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"cannot read the label map {path}: {error}") from error
    # an object is read as a tuple of pairs
    if not isinstance(content, tuple) or not all(isinstance(name, str) for _, name in content):
        raise CorpusError(f'the label map {path} must be one JSON object of names, such as {{"neg": "negative"}}')
    names = dict(content)
    for label, name in content:
        if names[label] != name:
            raise CorpusError(f"the label map {path} has {label!r} twice, as {name!r} and as {names[label]!r}")
    return names
