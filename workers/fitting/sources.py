"""What a corpus is made of besides its rows: the files, data set and label map that were named. Without torch."""

import json
from pathlib import Path

from workers.fitting.errors import CorpusError
from workers.fitting.files import files_of, is_hub, is_saved, without_password
from workers.fitting.paper_datasets import PAPER_DATASETS, PaperDataset

HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a data set."""


def check_source(source: str | None) -> None:
    """Raises CorpusError if `source` names a file that is not there: known before a model is loaded for it."""
    if source is None or is_hub(source) or is_saved(source):
        return
    if "://" in source:
        raise CorpusError(
            f"{without_password(source)}: only files of this machine are read here; with --ray, addresses too"
        )
    files_of(source)


def check_on_hub(source: str) -> None:
    """Raises CorpusError if the hub says that it has no such data set. Not reached, it says nothing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(source, timeout=HUB_SECONDS)
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        raise CorpusError(f"no such file or directory: {source}, nor a data set of that name on the hub") from None
    except Exception:  # of whatever makes the connection; reading will say so, if it needs the hub
        return


def paper_dataset(name: str | None) -> PaperDataset | None:
    """One of the paper's data sets; None: none was named.

    Raises:
        CorpusError: there is none of that name.
    """
    if name is None:
        return None
    if name not in PAPER_DATASETS:
        raise CorpusError(f"no data set {name!r} is known by name; known: {', '.join(PAPER_DATASETS)}")
    return PAPER_DATASETS[name]


def load_label_map(path: Path) -> dict[str, str]:
    """A JSON object of names in the data to names of the model.

    Raises:
        CorpusError: it is no such object.
    """
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=tuple)
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"cannot read the label map {path}: {error}") from error
    # a tuple of pairs is an object
    if not isinstance(content, tuple) or not all(isinstance(name, str) for _, name in content):
        raise CorpusError(f'the label map {path} must be one JSON object of names, such as {{"neg": "negative"}}')
    names = dict(content)
    for label, name in content:
        if names[label] != name:
            raise CorpusError(f"the label map {path} has {label!r} twice, as {name!r} and as {names[label]!r}")
    return names
