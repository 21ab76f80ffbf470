"""The paper's data sets by name: where the hub has them, and what their classes are called there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class PaperDataset:
    """One data set.

    Attributes:
        path, config: on the hub. train, test: its labelled splits.
        text_field, label_field: its columns.
        labels: class names as on the hub, in the order of their numbers.
        aliases: other names of the classes, as files of the same data often have them.
    """

    path: str
    labels: tuple[str, ...]
    text_field: str = "text"
    label_field: str = "label"
    config: str | None = None
    train: str = "train"
    test: str = "test"
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def class_of(self, name: str) -> str:
        """The hub's name of a class that a file calls `name`; `name` itself if it is none of them."""
        if name in self.labels:
            return name
        by_folded_name = {label.casefold(): label for label in self.labels} | dict(self.aliases)
        return by_folded_name.get(name.strip().casefold(), name)

    def split(self, name: str) -> str:
        """The split of the hub that serves as "train" or "test"; any other name is that of a split."""
        return {"train": self.train, "test": self.test}.get(name, name)


PAPER_DATASETS: Mapping[str, PaperDataset] = MappingProxyType(
    {
        "imdb": PaperDataset(
            "stanfordnlp/imdb", ("neg", "pos"), aliases=MappingProxyType({"negative": "neg", "positive": "pos"})
        ),
        "sst2": PaperDataset(
            "stanfordnlp/sst2",
            ("negative", "positive"),
            text_field="sentence",
            test="validation",  # the labels of its test split are not public
            aliases=MappingProxyType({"neg": "negative", "pos": "positive"}),
        ),
        "ag_news": PaperDataset(
            "fancyzhx/ag_news",
            ("World", "Sports", "Business", "Sci/Tech"),
            aliases=MappingProxyType({"scitech": "Sci/Tech", "sci-tech": "Sci/Tech", "sci_tech": "Sci/Tech"}),
        ),
        "emotion": PaperDataset(
            "dair-ai/emotion", ("sadness", "joy", "love", "anger", "fear", "surprise"), config="split"
        ),
        "dbpedia_14": PaperDataset(
            "fancyzhx/dbpedia_14",
            (
                "Company",
                "EducationalInstitution",
                "Artist",
                "Athlete",
                "OfficeHolder",
                "MeanOfTransportation",
                "Building",
                "NaturalPlace",
                "Village",
                "Animal",
                "Plant",
                "Album",
                "Film",
                "WrittenWork",
            ),
            text_field="content",
        ),
    }
)
