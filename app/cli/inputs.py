"""Whether what a job works on is there at all: told at once, before torch is loaded, which takes many seconds."""

from app.choices import CorpusChoice, ModelChoice, RayChoice
from workers.fitting.files import is_hub
from workers.fitting.paper_datasets import PAPER_DATASETS
from workers.fitting.sources import check_on_hub, check_source, load_label_map, paper_dataset
from workers.models.prompts import load_template
from workers.models.source import check_checkpoint


def check_model(model: ModelChoice, cluster: RayChoice | None = None) -> None:
    """Raises CheckpointError if the checkpoint or its prompt template is not there.

    Args:
        cluster: where it is loaded, if not here; its nodes may have other directories.
    """
    if cluster is None:
        check_checkpoint(model.source, model.revision)
    if model.template is not None:
        load_template(model.template)


def check_texts(*choices: CorpusChoice | None, cluster: RayChoice | None = None) -> None:
    """Raises CorpusError if the files, the data set or the label map of a corpus are not there.

    Args:
        cluster: where they are read, if not here; it reads addresses too, and looks by itself.
    """
    for choice in choices:
        if choice is not None:
            paper_dataset(choice.dataset)
            if choice.label_map is not None:
                load_label_map(choice.label_map)
            if cluster is None:
                check_source(choice.source)
            if choice.source is not None and choice.source not in PAPER_DATASETS and is_hub(choice.source):
                check_on_hub(choice.source)
